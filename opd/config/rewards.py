"""What a whole completion is worth."""

from dataclasses import dataclass

from omegaconf import MISSING

from opd.config.keeping import GraderKind


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """Nothing: only the teacher speaks."""


@dataclass(kw_only=True, slots=True)
class MeasuredRewardConfig(RewardConfig):
    """Against the other completions of the same prompt: the reward less their mean."""

    scale: bool = True
    """Divide by the standard deviation of the group too (GRPO); false is Dr. GRPO."""


@dataclass(kw_only=True, slots=True)
class GraderRewardConfig(MeasuredRewardConfig):
    """1 for a right answer, 0 for a wrong one."""

    grader: GraderKind | None = None
    """How a completion is compared with the answer; by default eval.grader."""
    marker: str | None = None
    """grader=after: the answer is what follows the last marker; by default eval.marker."""


@dataclass(kw_only=True, slots=True)
class FunctionRewardConfig(MeasuredRewardConfig):
    """What your own function says."""

    function: str = MISSING
    """module:name of a function (completion: str, answer: str | None) -> float; it is your code that runs."""
