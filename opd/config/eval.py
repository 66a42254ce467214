"""``eval``: the evaluation on held-out prompts."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from opd.config.fields import bounded
from opd.config.rollout import LEAST_TEMPERATURE, DatasetRolloutConfig

if TYPE_CHECKING:
    from opd.config.schema import Config


class GraderKind(StrEnum):
    exact = "exact"
    after = "after"
    contains = "contains"
    number = "number"
    math = "math"


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The evaluation on held-out prompts."""

    task: str = "heldout"
    """Name of the task in the metrics: eval/<task>/accuracy."""
    every: int = bounded(50, least=0)
    """Steps between evaluations; 0: only those before and after training, which always happen."""
    grader: GraderKind = GraderKind.exact
    """How a completion is compared with the answer."""
    marker: str = "#"
    """grader=after: the answer is what follows the last marker."""
    max_tokens: int | None = bounded(None, least=1)
    """Longest completion; by default rollout.max_tokens."""
    k: int = bounded(0, least=0)
    """Samples per prompt for mean@k; 0: only greedy accuracy."""
    temperature: float = bounded(1.0, least=LEAST_TEMPERATURE)
    """Temperature of those samples."""
    kl_prompts: int = bounded(64, least=0)
    """Number of held-out prompts on which the exact reverse KL to the teacher is measured."""
    kl_data: str | None = None
    """Prompts for that measurement, of the same kinds as data.eval; by default data.eval."""
    samples: int = bounded(4, least=0)
    """Transcripts kept from each evaluation."""
    teacher_accuracy: bool = True
    """Evaluate the teacher once as a reference, when teacher.model is known."""


def evaluation_needs_an_engine(config: "Config") -> str | None:
    """rollout=dataset has no engine to generate completions of held-out prompts."""
    if isinstance(config.rollout, DatasetRolloutConfig) and config.data.eval is not None:
        return (
            "rollout=dataset has no engine to evaluate data.eval with: use data.eval=null, or "
            "rollout=vllm with rollout.on_policy=0"
        )
    return None


RULES = (evaluation_needs_an_engine,)
