"""The cases of ``tests.support.ranks``: what their names mean, by kind.

engines   zero/precision/optimizer/max_tokens               the quickstart's student, 3 steps
masks     trains/zero/precision/optimizer/max_grad_norm/steps    a tiny model
record    the same, with a record of its weights
experts   as masks, a tiny mixture of experts
skips     a mask's case/FAULT                               its second step has a fault of ``FAULTS``
moved     a mask's case@CASE                               goes on from the checkpoint that CASE left
losses    loss/zero/ranks/max_tokens/chunk_rows             one step of a loss of ``LOSSES``

A fault ``absent`` leaves that step out of the run altogether.

``zero`` is 0 to 3, or torch for the engine without DeepSpeed. ``trains`` is dense, compact or restore,
or the name of scores: then everything is trained and the case leaves the scores. ``/resumed`` at the
end of an engine's, a mask's or a record's case: saved, and loaded into another learner, on the way.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from opd.batch import Batch, LossOutput
from opd.config.loss import (
    DivergenceLossConfig,
    LossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.config.mask import MaskTraining
from opd.config.optim import AdamWConfig, OptimConfig, SGDConfig
from opd.config.train import MaskScores, OnNonfinite, Precision
from opd.interfaces import Loss
from opd.train.learner import StudentLearner
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
from tests.support.learners import (
    LONGEST,
    QUICKSTART_VOCAB,
    ROWS,
    TINY_VOCAB,
    Setup,
    fixed_scores,
    quickstart_student,
    tiny_experts,
    tiny_model,
)

RESUMED = "/resumed"
FAULTY_STEP = 1
K = 4
LOSSES: dict[str, LossConfig] = {
    "reverse_kl": DivergenceLossConfig(
        weighting=Weighting.student_entropy,
        correction=Correction.geometric_truncate,
        correction_cap=0.9,
    ),
    "forward_kl": DivergenceLossConfig(
        kind=DivergenceKind.forward_kl,
        support=Support.teacher_top_k,
        weighting=Weighting.teacher_entropy,
        token_clip=2.0,
    ),
    "jsd": DivergenceLossConfig(
        kind=DivergenceKind.jsd,
        support=Support.intersection,
        weighting=Weighting.gap,
        correction=Correction.truncate,
        reduction=Reduction.sequence,
    ),
    "skew_kl": DivergenceLossConfig(
        kind=DivergenceKind.skew_kl,
        support=Support.teacher_top_k,
        correction=Correction.mask,
        reward_weight=0.5,
        reduction=Reduction.constant,
    ),
    "skew_reverse_kl": DivergenceLossConfig(
        kind=DivergenceKind.skew_reverse_kl,
        correction=Correction.sequence_mask,
        correction_min=0.9,
        prefix_fraction=0.5,
    ),
    "policy_gradient": PolicyGradientLossConfig(reward_weight=0.5, discount=0.5),
    "plain": PolicyGradientLossConfig(surrogate=Surrogate.plain, correction=Correction.mask),
    "grpo": PolicyGradientLossConfig(
        teacher_weight=0.0, reward_weight=1.0, kl_coef=1e-3, reduction=Reduction.sequence
    ),
    "nll": NllLossConfig(weighting=Weighting.student_entropy, reward_weight=0.2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A learner, its batches, and when another one takes over.

    ``batch`` gives the global batch of a step. ``goes_on`` names the case whose checkpoint it starts from.
    """

    setup: Setup
    batch: Callable[[StudentLearner, int], list[ScoredRollout]]
    resume_at: int | None = None
    records: bool = False
    goes_on: str | None = None


def engine_case(name: str) -> Case:
    zero, precision, optimizer, max_tokens = name.removesuffix(RESUMED).split("/")
    optim: OptimConfig = SGDConfig(lr=0.1, weight_decay=0.1, max_grad_norm=1.0, momentum=0.9)
    if optimizer == "adamw":
        optim = AdamWConfig(lr=3e-3, weight_decay=0.1, max_grad_norm=1.0, warmup_steps=2)
    setup = Setup(
        model=quickstart_student,
        zero=_stage(zero),
        precision=Precision(precision),
        optim=optim,
        steps=3,
        max_tokens=int(max_tokens),
    )
    return Case(
        setup=setup,
        batch=lambda learner, step: fixed_scores(step, QUICKSTART_VOCAB),
        resume_at=2 if name.endswith(RESUMED) else None,
    )


def mask_case(name: str) -> Case:
    trains, zero, precision, optimizer, clip, steps = name.removesuffix(RESUMED).split("/")
    max_grad_norm = float(clip)
    optim: OptimConfig = SGDConfig(
        lr=0.03, weight_decay=0.1, max_grad_norm=max_grad_norm, momentum=0.9
    )
    if optimizer == "adamw":
        optim = AdamWConfig(lr=3e-3, weight_decay=0.1, max_grad_norm=max_grad_norm, warmup_steps=2)
    setup = Setup(
        model=tiny_model,
        zero=_stage(zero),
        precision=Precision(precision),
        optim=optim,
        steps=int(steps),
        max_tokens=40,
        mask=MaskTraining(trains) if trains in list(MaskTraining) else None,
        scores=MaskScores(trains) if trains in list(MaskScores) else MaskScores.none,
        shards_all=True,
    )
    return Case(
        setup=setup,
        batch=lambda learner, step: fixed_scores(step, TINY_VOCAB),
        resume_at=setup.steps // 2 if name.endswith(RESUMED) else None,
    )


class FaultyLoss:
    """A ``Loss`` that is infinite, or has gradients that are no numbers."""

    def __init__(self, loss: Loss, fault: str) -> None:
        self._loss = loss
        self._fault = fault

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        if self._fault == "norm" and student_logp_NV.requires_grad:
            student_logp_NV.register_hook(lambda grad: grad * math.nan)
        out = self._loss(student_logp_NV, batch)
        # the gradient of this infinity is 0
        return replace(out, total=out.total + math.inf) if self._fault == "loss" else out


def skip_case(name: str) -> Case:
    plain, fault = name.rsplit("/", 1)
    case = mask_case(plain)
    losses: list[Loss] = []

    def batch(learner: StudentLearner, step: int) -> list[ScoredRollout]:
        losses.append(learner._loss)
        is_last_rank = learner._world.rank == learner._world.size - 1
        learner._loss = losses[0]
        if step == FAULTY_STEP and fault == "absent":
            return []
        if step == FAULTY_STEP and is_last_rank:
            learner._loss = FaultyLoss(losses[0], fault)
        return case.batch(learner, step)

    return replace(case, setup=replace(case.setup, on_nonfinite=OnNonfinite.skip), batch=batch)


def moved_case(name: str) -> Case:
    own, _, before = name.partition("@")
    return replace(mask_case(own), goes_on=before or None)


def record_case(name: str) -> Case:
    return replace(mask_case(name), records=True)


def experts_case(name: str) -> Case:
    case = mask_case(name)
    return replace(case, setup=replace(case.setup, model=tiny_experts))


def loss_case(name: str) -> Case:
    loss, zero, _, max_tokens, chunk_rows = name.split("/")
    config = LOSSES[loss]
    setup = Setup(
        model=quickstart_student,
        zero=_stage(zero),
        precision=Precision.fp32,
        optim=SGDConfig(lr=0.1, weight_decay=0.0, momentum=0.0),
        steps=1,
        max_tokens=int(max_tokens),
        loss=config,
        chunk_rows=int(chunk_rows),
    )
    return Case(setup=setup, batch=lambda learner, step: _loss_batch(config, learner))


KINDS: dict[str, Callable[[str], Case]] = {
    "engines": engine_case,
    "masks": mask_case,
    "record": record_case,
    "skips": skip_case,
    "moved": moved_case,
    "experts": experts_case,
    "losses": loss_case,
}


def _stage(zero: str) -> int | None:
    return None if zero == "torch" else int(zero)


def _loss_batch(config: LossConfig, learner: StudentLearner) -> list[ScoredRollout]:
    """An engine a little off, one completion of a data set, a random teacher.

    Full log-probs come only with the losses that request them.
    """
    rng = np.random.default_rng(1)
    full_support = isinstance(config, DivergenceLossConfig) and config.support == Support.full
    rollouts, vocab = _rollouts(QUICKSTART_VOCAB), QUICKSTART_VOCAB
    batch = []
    for row, (rollout, logps) in enumerate(zip(rollouts, learner.logps(rollouts), strict=True)):
        length = len(logps)
        noise = 0.3 * rng.normal(size=length)
        engine_logps = (logps + noise) if row != 2 else np.full(length, np.nan)
        full = torch.log_softmax(torch.from_numpy(rng.normal(size=(length, vocab))), -1).numpy()
        ids = np.argsort(-full, axis=1)[:, :K]
        support = np.take_along_axis(full, ids, axis=1)
        batch.append(
            ScoredRollout(
                rollout=replace(rollout, logps=engine_logps.astype(np.float32)),
                logps=full[np.arange(length), rollout.token_ids].astype(np.float32),
                support=SupportLogps(
                    ids=ids.astype(np.int32),
                    logps=support.astype(np.float32),
                    tail_logp=np.log1p(-np.exp(support).sum(1)).astype(np.float32),
                ),
                full_logps=full.astype(np.float32) if full_support else None,
                advantage=float(rng.normal()),
            )
        )
    return batch


def _rollouts(vocab: int) -> list[Rollout]:
    """Completions of 1 to ``LONGEST`` tokens, with half of the ids as the engine's likeliest."""
    rng = np.random.default_rng(0)
    lengths = [1, *rng.integers(2, LONGEST + 1, ROWS - 1)]
    return [
        Rollout(
            prompt=Prompt(uid=str(row), token_ids=rng.integers(3, vocab, 5).astype(np.int32)),
            token_ids=rng.integers(3, vocab, length).astype(np.int32),
            logps=np.zeros(length, np.float32),
            finish_reason=FinishReason.length,
            version=0,
            support_ids=rng.permuted(np.tile(np.arange(vocab), (length, 1)), axis=1)[
                :, : vocab // 2
            ].astype(np.int32),
        )
        for row, length in enumerate(lengths)
    ]
