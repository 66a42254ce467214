"""The seams: the loop's clients, as Protocols. A class either is one of these or is final."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from opd.types import (
    Evaluation,
    FloatArray,
    Prompt,
    Rollout,
    Sampling,
    ScoredRollout,
    StepReport,
    TeacherInfo,
)

if TYPE_CHECKING:
    import torch

    from opd.batch import Batch, LossOutput

Weights = Iterable[tuple[str, "torch.Tensor"]]
"""(name, tensor) of each weight, under its Hugging Face name."""


class PromptStream(Protocol):
    """Training prompts in a resumable order: step k always gets the same prompts."""

    def take(self, step: int) -> list[Prompt]:
        """This rank's prompts of optimizer step ``step`` (from 0)."""
        ...


class RolloutEngine(Protocol):
    """Generates completions: token ids in, token ids and log-probs out."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """``sampling.n`` rollouts per prompt, grouped by prompt in the order given."""
        ...


class Teacher(Protocol):
    """Scores every token of a rollout."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """One ``ScoredRollout`` per rollout, in the order given."""
        ...

    def info(self) -> TeacherInfo:
        """The teacher's description of itself; cheap, so that it can be checked before anything else."""
        ...

    def head(self, name: str | None = None) -> FloatArray:
        """The output head [V, D] that turns ``ScoredRollout.hidden`` into logits.

        ``name`` chooses one of several teachers that prompts name.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """What one rank learns from in one step; ``metrics`` are seconds and figures of writing and scoring."""

    scored: list[ScoredRollout]
    metrics: dict[str, float]

    @property
    def rollouts(self) -> list[Rollout]:
        """The rollouts without their scores."""
        return [s.rollout for s in self.scored]


class Schedule(Protocol):
    """Decides when rollouts are written and scored: before the learner learns, or beside it."""

    def batch(self, step: int) -> StepBatch:
        """This rank's scored rollouts of optimizer step ``step`` (from 1)."""
        ...

    def finish(self) -> dict[str, float]:
        """Wait until nobody uses the rollout engine, so that weights may be pushed; metrics of the wait."""
        ...

    def save(self, folder: str) -> None:
        """Everything needed to go on bit for bit, after ``finish``."""
        ...

    def load(self, folder: str, step: int) -> None:
        """Restore what ``save`` wrote after ``step``."""
        ...


class Loss(Protocol):
    """A pure function of a chunk of tokens; it returns sums, so chunks, micro-batches and ranks add."""

    def __call__(self, student_logp_NV: "torch.Tensor", batch: "Batch") -> "LossOutput":
        """``student_logp_NV`` float32 with gradient; the batch's row n is about the same token n."""
        ...


class Learner(Protocol):
    """The student in training."""

    def step(self, scored: Sequence[ScoredRollout]) -> StepReport:
        """One optimizer step on this rank's share; collective."""
        ...

    def weights(self) -> "Weights":
        """Full tensors under their Hugging Face names, fused modules' parts adjacent; collective."""
        ...

    def save(self, folder: str) -> None:
        """Everything needed to go on bit for bit; collective."""
        ...

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote; collective."""
        ...


class StudentScorer(Protocol):
    """Evaluates the student without changing it."""

    def logps(self, rollouts: Sequence[Rollout]) -> list[FloatArray]:
        """The learner's log-probs [T] of each rollout's tokens; collective."""
        ...

    def measure(self, scored: Sequence[ScoredRollout], loss: Loss) -> dict[str, float]:
        """The loss's metrics per token over all ranks, no gradient; collective."""
        ...


class WeightSync(Protocol):
    """The one edge that goes back: the learner's weights into the rollout engine."""

    def push(self, weights: "Weights", version: int) -> Mapping[str, float]:
        """Send the weights and return metrics (``sync/bytes``); collective."""
        ...


class Evaluator(Protocol):
    """Evaluates the student on the held-out set."""

    def evaluate(self, step: int) -> Evaluation:
        """Metrics reduced over ranks; collective."""
        ...


class Tracker(Protocol):
    """Records metrics and samples."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for one step."""
        ...

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few transcripts of one evaluation."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


class Progress(Protocol):
    """Live bars; a context that yields ``advance(n)``."""

    def track(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar named ``what`` of ``total`` units, gone when the context ends."""
        ...
