"""Rewards: a number for each completion, from a grader or from a function of the user's own."""

from collections.abc import Callable

from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.reward import FunctionRewardConfig, GraderRewardConfig, RewardConfig
from opd.evaluate.grade import Grade, grader
from opd.types import Answer

RewardFunction = Callable[[str, Answer | None], float]
"""(completion, answer) -> reward"""


def reward_function(config: RewardConfig, evaluation: EvalConfig) -> RewardFunction:
    """The reward function of a run; ValueError when reward.function cannot be imported."""
    match config:
        case GraderRewardConfig(grader=kind, marker=marker):
            chosen = kind or evaluation.grader
            return grade_reward(grader(chosen.value, marker or evaluation.marker))
        case FunctionRewardConfig(function=name):
            return load_function("reward.function", name)
    raise AssertionError(f"no reward for {type(config).__name__}")


def grade_reward(grade: Grade) -> RewardFunction:
    """1 for a correct completion, 0 for a wrong one and for a prompt without an answer."""

    def reward(completion: str, answer: Answer | None) -> float:
        return 0.0 if answer is None else float(grade(completion, answer))

    return reward
