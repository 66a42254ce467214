"""Rewards: what a verifier gives for one completion."""

from collections.abc import Callable

from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.reward import FunctionRewardConfig, GraderRewardConfig, RewardConfig
from opd.evaluate.grade import Grade, grader

RewardFunction = Callable[[str, str | None], float]
"""(completion, answer) -> reward"""


def reward_function(config: RewardConfig, evaluation: EvalConfig) -> RewardFunction:
    """The reward of a run; ValueError where a function of the user's cannot be imported."""
    match config:
        case GraderRewardConfig(grader=kind, marker=marker):
            chosen = kind or evaluation.grader
            return graded(grader(chosen.value, marker or evaluation.marker))
        case FunctionRewardConfig(function=name):
            return load_function("reward.function", name)
    raise AssertionError(f"no reward for {type(config).__name__}")


def graded(grade: Grade) -> RewardFunction:
    """1 for a right answer and 0 for a wrong one, or where there is none to compare with."""

    def reward(completion: str, answer: str | None) -> float:
        return 0.0 if answer is None else float(grade(completion, answer))

    return reward
