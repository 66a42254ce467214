"""GOLD's loss over two vocabularies (TRL), at positions where both sides have one token."""

import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
from peer_case import Case, Data, Tensor, V

from opd.config.uld import UldLossConfig
from opd.losses.uld import UniversalLogitDistillation
from opd.spans import CommonVocabulary
from opd.types import DivergenceKind

MATCHED = 9
"""Tokens of equal text; the student's first ids are the teacher's last ones."""
NOTHING = np.zeros(V, np.int32)
COMMON = CommonVocabulary(
    student_ids=np.arange(MATCHED, dtype=np.int32),
    teacher_ids=np.arange(V - 1, V - 1 - MATCHED, -1, dtype=np.int32),
    student_buckets=NOTHING,
    teacher_buckets=NOTHING,
)


def trl_gold_cases(d: Data) -> Iterator[Case]:
    """For 0 < beta < 1: elsewhere a KL of measures has a mass term that GOLD leaves out."""
    gold = importlib.import_module("trl.experimental.gold.gold_trainer")
    own = {f"own {i}": i for i in range(MATCHED, V)}
    other = {f"other {i}": i for i in range(V - MATCHED)}
    shared = list(zip(COMMON.student_ids.tolist(), COMMON.teacher_ids.tolist(), strict=True))
    own |= {f"both {m}": s for m, (s, _) in enumerate(shared)}
    other |= {f"both {m}": t for m, (_, t) in enumerate(shared)}
    for beta in (0.1, 0.5, 0.9):
        for weights in ((0.6, 0.4), (0.0, 1.0)):
            peer = gold.ULDLoss(
                _gold_config(beta, weights),
                SimpleNamespace(get_vocab=lambda: own),
                SimpleNamespace(get_vocab=lambda: other),
            )
            config = UldLossConfig(
                kind=DivergenceKind.jsd,
                beta=beta,
                matched_weight=weights[0],
                unmatched_weight=weights[1],
            )
            yield Case(
                peer="TRL",
                tests="test_gold_trainer",
                what="hybrid loss over two vocabularies, beta 0.1, 0.5, 0.9",
                logits=d.student_NV,
                theirs=lambda x, p=peer: _theirs(p, x, d),
                ours=lambda x, c=config: _ours(c, x, d),
            )


def _gold_config(beta: float, weights: tuple[float, float]) -> SimpleNamespace:
    return SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        uld_token_merge_strategy="bayesian",
        use_extended_uld=True,
        uld_use_hybrid_loss=True,
        uld_hybrid_matched_weight=weights[0],
        uld_hybrid_unmatched_weight=weights[1],
        beta=beta,
    )


def _theirs(peer: torch.nn.Module, logits_NV: Tensor, d: Data) -> Tensor:
    """GOLD's mean over positions, times their number; row n of the logits predicts target n."""
    count = len(d.target_N)
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), d.target_N])[None]
    labels = ids.clone()
    labels[0, 0] = -100
    offsets = torch.tensor([[(0, 0), *((n, n + 1) for n in range(count))]])
    rest = torch.zeros(1, V, dtype=logits_NV.dtype)
    student, teacher = (torch.cat([x, rest])[None] for x in (logits_NV, d.teacher_NV))
    return count * peer(student, teacher, labels, labels, ids, ids, offsets, offsets)


def _ours(config: UldLossConfig, logits_NV: Tensor, d: Data) -> Tensor:
    count = len(d.target_N)
    batch = d.batch(
        logits_NV,
        teacher_logp_NV=d.teacher_NV.log_softmax(-1),
        span_N=torch.arange(count),
        span_target_N=d.target_N,
        span_logp_N=torch.zeros(count, dtype=logits_NV.dtype),
        span_single_N=torch.ones(count, dtype=torch.bool),
    )
    return UniversalLogitDistillation(COMMON, config)(logits_NV.log_softmax(-1), batch).total
