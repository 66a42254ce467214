"""Run by test_loss_invariance.py in every rank: one step of every loss on the same scores.

    python loss_ranks.py OUT CUT [CUT ...]      CUT = engine_ranks_microtokens_chunkrows

``engine`` is torch or deepspeed.
"""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from opd.config.losses import GrpoLossConfig
from safetensors.torch import save_file

from opd.assembly.loss import build_loss, wants_sequence_gaps
from opd.batch import LossReduction
from opd.config.launch import merged_deepspeed
from opd.config.loss import (
    DivergenceLossConfig,
    LossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.config.optim import SGDConfig
from opd.config.train import Precision
from opd.head import HeadSpec
from opd.tracking.console import SilentProgress
from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.learner import StudentLearner
from opd.train.optimizers import build_optimizer
from opd.train.parameter_mask import DenseTraining
from opd.train.student import Student
from opd.train.torch_engine import TorchEngine
from opd.train.weights import load_student
from opd.types import (
    Correction,
    DivergenceKind,
    FinishReason,
    Prompt,
    Reduction,
    Rollout,
    ScoredRollout,
    SupportLogps,
    Surrogate,
    Weighting,
)
from opd.world import World, join_world

MODEL = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
ROWS, LONGEST, K = 8, 11, 4
CASES: dict[str, LossConfig] = {
    "reverse_kl": DivergenceLossConfig(
        weighting=Weighting.student_entropy, correction=Correction.sequence_truncate, cap=0.9
    ),
    "forward_kl": DivergenceLossConfig(
        kind=DivergenceKind.forward_kl,
        support=Support.teacher_top_k,
        weighting=Weighting.teacher_entropy,
        clip=2.0,
    ),
    "jsd": DivergenceLossConfig(
        kind=DivergenceKind.jsd,
        support=Support.intersection,
        weighting=Weighting.gap,
        correction=Correction.truncate,
        normalise=Reduction.sequence,
    ),
    "skew_kl": DivergenceLossConfig(
        kind=DivergenceKind.skew_kl,
        support=Support.teacher_top_k,
        correction=Correction.mask,
        reward_weight=0.5,
        normalise=Reduction.constant,
    ),
    "skew_reverse_kl": DivergenceLossConfig(
        kind=DivergenceKind.skew_reverse_kl,
        correction=Correction.sequence_mask,
        band_low=0.9,
        first_share=0.5,
    ),
    "policy_gradient": PolicyGradientLossConfig(reward_weight=0.5, discount=0.5),
    "plain": PolicyGradientLossConfig(surrogate=Surrogate.plain, correction=Correction.mask),
    "grpo": GrpoLossConfig(kl=1e-3, normalise=Reduction.sequence),
    "nll": NllLossConfig(weighting=Weighting.student_entropy, reward_weight=0.2),
}


def rollouts(vocab: int) -> list[Rollout]:
    draw = np.random.default_rng(0)
    lengths = [1, *draw.integers(2, LONGEST + 1, ROWS - 1)]
    return [
        Rollout(
            prompt=Prompt(uid=str(row), token_ids=draw.integers(3, vocab, 5).astype(np.int32)),
            token_ids=draw.integers(3, vocab, length).astype(np.int32),
            logps=np.zeros(length, np.float32),
            finish_reason=FinishReason.length,
            version=0,
            support_ids=draw.permuted(np.tile(np.arange(vocab), (length, 1)), axis=1)[
                :, : vocab // 2
            ].astype(np.int32),
        )
        for row, length in enumerate(lengths)
    ]


def scored(learner: StudentLearner, vocab: int) -> list[ScoredRollout]:
    """The global batch: an engine a little off, one completion of a data set, a random teacher."""
    draw = np.random.default_rng(1)
    found = []
    asked = rollouts(vocab)
    for row, (rollout, logps) in enumerate(zip(asked, learner.logps(asked), strict=True)):
        length = len(logps)
        noise = 0.3 * draw.normal(size=length)
        wrote = (logps + noise) if row != 2 else np.full(length, np.nan)
        full = torch.log_softmax(torch.from_numpy(draw.normal(size=(length, vocab))), -1).numpy()
        ids = np.argsort(-full, axis=1)[:, :K]
        kept = np.take_along_axis(full, ids, axis=1)
        found.append(
            ScoredRollout(
                rollout=replace(rollout, logps=wrote.astype(np.float32)),
                logps=full[np.arange(length), rollout.token_ids].astype(np.float32),
                support=SupportLogps(
                    ids=ids.astype(np.int32),
                    logps=kept.astype(np.float32),
                    tail_logp=np.log1p(-np.exp(kept).sum(1)).astype(np.float32),
                ),
                full_logps=full.astype(np.float32),
                advantage=float(draw.normal()),
            )
        )
    return found


def learner_of(
    config: LossConfig, engine_name: str, micro_tokens: int, rows: int, world: World
) -> tuple[StudentLearner, int]:
    optim = SGDConfig(lr=0.1, weight_decay=0.0, momentum=0.0)
    precision = Precision.fp32
    model = load_student(str(MODEL), dtype=torch.float32, attention="sdpa", trust_remote_code=False)
    vocab = model.config.vocab_size
    student = Student(
        model,
        spec=HeadSpec(vocab_size=vocab),
        temperature=1.0,
        chunk_bytes=rows * 4 * vocab,
        teacher_head=lambda name: torch.empty(0),
        sequence_gaps=wants_sequence_gaps(config),
    )
    optimizer = build_optimizer(student, optim)
    everything = DenseTraining(student)
    if engine_name == "torch":
        engine = TorchEngine(
            student,
            optimizer,
            gradients=everything.gradients,
            precision=precision,
            clip=optim.clip,
            device=world.device,
        )
    else:
        merged = merged_deepspeed(None, zero=1, precision=precision, clip=optim.clip)
        engine = DeepSpeedEngine(student, optimizer, config=merged, world=world)
    learner = StudentLearner(
        engine,
        model,
        build_loss(config),
        parameter_mask=everything,
        optim=optim,
        steps=1,
        micro_tokens=micro_tokens,
        pad_id=0,
        discount=config.discount if isinstance(config, PolicyGradientLossConfig) else 0.0,
        world=world,
        progress=SilentProgress(),
        reduction=LossReduction(
            normalise=config.normalise, first_share=config.first_share, max_tokens=LONGEST
        ),
    )
    return learner, vocab


def seen(item: ScoredRollout, config: LossConfig) -> ScoredRollout:
    """What this loss would have asked for."""
    full = isinstance(config, DivergenceLossConfig) and config.support == Support.full
    return item if full else replace(item, full_logps=None)


def main(out: Path, cuts: list[str]) -> None:
    from accelerate.state import AcceleratorState

    world = join_world()
    for cut, (name, config) in itertools.product(cuts, CASES.items()):
        engine, _, micro_tokens, rows = cut.split("_")
        folder = out / cut
        AcceleratorState._reset_state(reset_partial_state=True)
        learner, vocab = learner_of(config, engine, int(micro_tokens), int(rows), world)
        batch = [seen(item, config) for item in scored(learner, vocab)]
        metrics = learner.step(batch[world.rank :: world.size]).metrics
        weights = {key: tensor.float().clone() for key, tensor in learner.weights()}
        if world.is_main:
            folder.mkdir(exist_ok=True)
            save_file(weights, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
