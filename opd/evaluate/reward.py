"""Rewards: a number for each completion, from a grader or from a function of the user's own."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.config.eval import EvalConfig
from opd.config.functions import load_function
from opd.config.reward import FunctionRewardConfig, GraderRewardConfig, RewardConfig
from opd.evaluate.grade import Grade, grader
from opd.evaluate.reward_call import called
from opd.types import Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A completion to be rewarded: its text, and the answer, the text and the row of its prompt."""

    completion: str
    answer: Answer | None = None
    prompt: str = ""
    row: Mapping[str, Any] | None = None
    uid: str = ""


RewardFunction = Callable[[Sequence[Completed]], list[float]]
"""Completions -> their rewards"""


def reward_function(config: RewardConfig, evaluation: EvalConfig) -> RewardFunction:
    """The reward function of a run; ValueError when reward.function cannot be imported or called.

    What reward.function raises, and what it returns that is no finite number, becomes a ValueError, which
    names the prompt.
    """
    match config:
        case GraderRewardConfig(grader=kind, marker=marker):
            chosen = kind or evaluation.grader
            return grade_reward(grader(chosen.value, marker or evaluation.marker))
        case FunctionRewardConfig(function=name):
            return _checked(load_function("reward.function", name), name)
    raise AssertionError(f"no reward for {type(config).__name__}")


def _checked(function: Callable[..., Any], name: str) -> RewardFunction:
    call = called(function, f"reward.function={name}")

    def rewards(completed: Sequence[Completed]) -> list[float]:
        returned = call([(c.uid, _arguments(c)) for c in completed])
        return [_number(c.uid, value, name) for c, value in zip(completed, returned, strict=True)]

    return rewards


def _arguments(completed: Completed) -> dict[str, Any]:
    """By the names of a reward function's parameters."""
    return {
        "completion": completed.completion,
        "answer": completed.answer,
        "prompt": completed.prompt,
        "row": dict(completed.row or {}),
    }


def _number(uid: str, returned: Any, name: str) -> float:
    try:
        number = math.nan if isinstance(returned, str | bytes) else float(returned)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"a completion of prompt {uid}: reward.function={name} returned {str(returned)[:60]!r} of type "
            f"{type(returned).__name__}; expected a finite number"
        )
    return number


def grade_reward(grade: Grade) -> RewardFunction:
    """1 for a correct completion, 0 for a wrong one and for a prompt without an answer."""

    def rewards(completed: Sequence[Completed]) -> list[float]:
        return [
            0.0 if c.answer is None else float(grade(c.completion, c.answer)) for c in completed
        ]

    return rewards
