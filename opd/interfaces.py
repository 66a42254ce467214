"""The seams: what the loop holds, as Protocols. A class either is one of these or is final."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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
    """Training prompts in a resumable order: step k asks for the same prompts, whenever asked."""

    def take(self, step: int) -> list[Prompt]:
        """This rank's prompts of optimizer step ``step`` (from 0)."""
        ...


class RolloutEngine(Protocol):
    """Writes completions: token ids in, token ids and log-probs out."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """``sampling.n`` rollouts a prompt, grouped by prompt in the order given."""
        ...


class Teacher(Protocol):
    """Scores every token that a student wrote."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """One ``ScoredRollout`` a rollout, in the order given."""
        ...

    def info(self) -> TeacherInfo:
        """What the teacher is; cheap, and asked before anything expensive."""
        ...

    def head(self, name: str | None = None) -> FloatArray:
        """The output head [V, D] that turns ``ScoredRollout.hidden`` into logits.

        ``name`` says whose, where prompts name one of several.
        """
        ...


class Loss(Protocol):
    """A pure function of a chunk of tokens; sums out, so chunks, micro-batches and ranks just add."""

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
        """Undo of ``save``; collective."""
        ...


class StudentScorer(Protocol):
    """Reads the student without moving it."""

    def logps(self, rollouts: Sequence[Rollout]) -> list[FloatArray]:
        """The learner's log-probs [T] of each rollout's tokens; collective."""
        ...

    def measure(self, scored: Sequence[ScoredRollout], loss: Loss) -> dict[str, float]:
        """The loss's metrics per token over all ranks, no gradient; collective."""
        ...


class WeightSync(Protocol):
    """The one edge that goes back: the learner's weights into the rollout engine."""

    def push(self, weights: "Weights", version: int) -> Mapping[str, float]:
        """Hand over and return metrics (``sync/bytes``); collective."""
        ...


class Evaluator(Protocol):
    """Asks held-out questions."""

    def evaluate(self, step: int) -> Evaluation:
        """Metrics reduced over ranks; collective."""
        ...


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for one step."""
        ...

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few transcripts of one evaluation."""
        ...

    def close(self) -> None:
        """Flush and write what is left to write."""
        ...


class Progress(Protocol):
    """Live bars; a context that yields ``advance(n)``."""

    def track(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar named ``what`` of ``total`` units, gone when the context ends."""
        ...
