"""Numbers that are not finite end a run, or a step, before they reach a weight."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from opd.config.train import OnNonfinite
from opd.faults import RunError
from opd.train.engine import TrainingEngine
from opd.types import ScoredRollout
from opd.world import World

ADVICE = (
    "nothing of this step is saved; the same command goes on from the last checkpoint: lower optim.lr, set "
    "optim.max_grad_norm, or look at the sample"
)
MOST_SKIPPED = 10
"""Steps skipped one after the other that end a run: it learns nothing any more."""
BF16_EXPONENT = 0x7F80
"""Bits of a bfloat16 that are all set in infinities and NaN."""


class SkippedSteps:
    """What becomes of steps whose loss or gradient norm is not finite, and how many were skipped."""

    def __init__(self, policy: OnNonfinite, world: World) -> None:
        self._skips = policy == OnNonfinite.skip
        self._world = world
        self._total = self._in_a_row = 0

    @property
    def total(self) -> int:
        """Skipped steps since the start of the run."""
        return self._total

    def take(self, step: int, fault: str | None) -> None:
        """Count a step; ``fault`` says what was not finite, the same kind on every rank.

        Raises RunError when faults stop the run, or when too many steps in a row had one.
        """
        if fault is None:
            self._in_a_row = 0
            return
        if not self._skips:
            raise RunError(f"step {step}: {fault}; {ADVICE}")
        self._total += 1
        self._in_a_row += 1
        if self._in_a_row >= MOST_SKIPPED:
            raise RunError(
                f"step {step}: {fault}, as in each of the {MOST_SKIPPED} steps so far, which were "
                f"skipped; {ADVICE}"
            )
        print(f"step {step} is skipped: {fault}", file=sys.stderr)

    def metrics(self) -> dict[str, float]:
        """The number of skipped steps, where steps may be skipped."""
        return {"optim/skipped_steps": float(self._total)} if self._skips else {}

    def state(self) -> dict[str, int]:
        """What a checkpoint holds."""
        return {"total": self._total, "in_a_row": self._in_a_row}

    def load(self, state: dict[str, int]) -> None:
        """Inverse of ``state``."""
        self._total, self._in_a_row = state["total"], state["in_a_row"]


def find_loss_fault(
    losses: Sequence[tuple[float, Sequence[ScoredRollout]]],
    model: torch.nn.Module,
    engine: TrainingEngine,
    world: World,
    step: int,
) -> str | None:
    """What is wrong where the loss of a micro-batch on any rank is not finite; None otherwise. Collective.

    ``losses`` are this rank's, each with the rollouts that it is of. Raises RunError on every rank when
    the cause is a weight or a number that the loss was given: a skipped step would not help.
    """
    bad = [(loss, group) for loss, group in losses if not math.isfinite(loss)]
    if not world.max({"bad": float(len(bad))})["bad"]:
        return None
    causes = [cause for _, group in bad for each in group if (cause := find_bad_input(each))]
    weight = first_nonfinite_weight(model, engine)
    if weight is not None:
        causes.append(f"the weight {weight} is not finite")
    elsewhere = "the loss of another rank, whose log names the sample, is not finite"
    fault = _describe(bad[0]) if bad else elsewhere
    if world.max({"causes": float(len(causes))})["causes"]:
        because = f", because {causes[0]}" if causes else ""
        raise RunError(f"step {step}: {fault}{because}; {ADVICE}")
    return fault


def _describe(bad: tuple[float, Sequence[ScoredRollout]]) -> str:
    loss, group = bad
    prompts = ", ".join(dict.fromkeys(s.rollout.prompt.uid for s in group[:4]))
    return f"the loss is {loss} in a micro-batch with prompt {prompts}"


def find_bad_input(scored: ScoredRollout) -> str | None:
    """The teacher's tensor or the reward of a completion that is not finite, with prompt and token."""
    prompt = scored.rollout.prompt
    teacher = f"the teacher {prompt.teacher}" if prompt.teacher else "the teacher"
    for name, rows in _teacher_tensors(scored):
        bad_T = rows.reshape(len(rows), -1).any(1)
        if bad_T.any():
            return (
                f"{name} that {teacher} gave for token {int(np.argmax(bad_T))} of a completion of prompt "
                f"{prompt.uid} is not finite"
            )
    for name, value in (("reward", scored.reward), ("advantage", scored.advantage)):
        if value is not None and not math.isfinite(value):
            return f"the {name} of a completion of prompt {prompt.uid} is {value}"
    return None


def _teacher_tensors(scored: ScoredRollout) -> Iterator[tuple[str, Any]]:
    """(name, where it is no number [T, ...]) of what a teacher gave; -inf is a log-prob of 0."""
    if scored.logps is not None:
        yield "the log-prob", ~np.isfinite(scored.logps)
    if scored.support is not None:
        yield "a log-prob of the support", np.isnan(scored.support.logps)
        yield "the log-prob of the tail", np.isnan(scored.support.tail_logp)
    if scored.full_logps is not None:
        yield "the distribution", np.isnan(scored.full_logps)
    if scored.hidden is not None:
        hidden: Any = scored.hidden
        is_bits = hidden.dtype == np.uint16
        bad = (hidden & BF16_EXPONENT) == BF16_EXPONENT if is_bits else ~np.isfinite(hidden)
        yield "the hidden state", bad


def require_finite_weights(
    model: torch.nn.Module, engine: TrainingEngine, world: World, step: int
) -> None:
    """RunError on every rank when a weight on any rank is not finite; collective."""
    weight = first_nonfinite_weight(model, engine)
    if not world.max({"bad": float(weight is not None)})["bad"]:
        return
    where = "a weight of another rank" if weight is None else f"the weight {weight}"
    raise RunError(f"step {step}: {where} is not finite; {ADVICE}")


@torch.no_grad()
def first_nonfinite_weight(model: torch.nn.Module, engine: TrainingEngine) -> str | None:
    """The name of the first parameter with a number that is not finite in this rank's parts of it."""
    names: list[str] = []
    finite: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        for part, _ in engine.parts(parameter):
            names.append(name)
            finite.append(part.isfinite().all())
    all_finite = torch.stack(finite).tolist() if finite else []  # one wait for the device
    return next((name for name, fine in zip(names, all_finite, strict=True) if not fine), None)
