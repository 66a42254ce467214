"""Rewards: a number for each completion, from a grader or from a function of the user's own."""

import math
from collections.abc import Callable
from typing import Any

from opd.config.eval import EvalConfig
from opd.config.functions import USER_ERRORS, describe_error, load_function
from opd.config.reward import FunctionRewardConfig, GraderRewardConfig, RewardConfig
from opd.evaluate.grade import Grade, grader
from opd.types import Answer

RewardFunction = Callable[[str, Answer | None], float]
"""(completion, answer) -> reward"""


def reward_function(config: RewardConfig, evaluation: EvalConfig) -> RewardFunction:
    """The reward function of a run; ValueError when reward.function cannot be imported.

    What reward.function raises, and what it returns that is no finite number, becomes a ValueError.
    """
    match config:
        case GraderRewardConfig(grader=kind, marker=marker):
            chosen = kind or evaluation.grader
            return grade_reward(grader(chosen.value, marker or evaluation.marker))
        case FunctionRewardConfig(function=name):
            return _checked(load_function("reward.function", name), name)
    raise AssertionError(f"no reward for {type(config).__name__}")


def _checked(function: Callable[[str, Answer | None], Any], name: str) -> RewardFunction:
    def reward(completion: str, answer: Answer | None) -> float:
        try:
            returned = function(completion, answer)
        except USER_ERRORS as error:
            raise ValueError(
                f"reward.function={name} failed ({describe_error(error)}); correct the function"
            ) from error
        try:
            number = math.nan if isinstance(returned, str | bytes) else float(returned)
        except USER_ERRORS:  # whatever float() of a foreign object raises
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward.function={name} returned {_shown(returned)} of type "
                f"{type(returned).__name__}; expected a finite number"
            )
        return number

    return reward


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:60])
    except USER_ERRORS:
        return "an object"


def grade_reward(grade: Grade) -> RewardFunction:
    """1 for a correct completion, 0 for a wrong one and for a prompt without an answer."""

    def reward(completion: str, answer: Answer | None) -> float:
        return 0.0 if answer is None else float(grade(completion, answer))

    return reward
