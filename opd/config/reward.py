"""``reward``: the reward of a completion."""

from dataclasses import dataclass
from typing import ClassVar

from omegaconf import MISSING

from opd.config.eval import GraderKind


@dataclass(kw_only=True, slots=True)
class RewardConfig:
    """No reward; the teacher is the only signal."""

    is_given: ClassVar[bool] = False


@dataclass(kw_only=True, slots=True)
class GroupRewardConfig(RewardConfig):
    """A reward per completion; its advantage is the reward minus the mean over the prompt's completions."""

    is_given: ClassVar[bool] = True
    scale_rewards: bool = True
    """Also divide by the group's standard deviation + 1e-4 (GRPO, as in TRL); false is Dr. GRPO."""


@dataclass(kw_only=True, slots=True)
class GraderRewardConfig(GroupRewardConfig):
    """1 for a correct completion, 0 for a wrong one."""

    grader: GraderKind | None = None
    """How a completion is compared with the answer; by default eval.grader."""
    marker: str | None = None
    """grader=after: the answer is what follows the last marker; by default eval.marker."""


@dataclass(kw_only=True, slots=True)
class FunctionRewardConfig(GroupRewardConfig):
    """The value of a user's own function."""

    function: str = MISSING
    """path.py:name or module:name of a function of some of completion, answer, prompt and row, by name.

    With completions, answers, prompts, rows it gets lists and returns a list. It may be async."""


CHOICES = {"none": RewardConfig, "grader": GraderRewardConfig, "function": FunctionRewardConfig}
