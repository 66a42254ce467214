"""Rewards: a number for each completion, from a grader or from a function of the user's own."""

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd.config.eval import EvalConfig
from opd.config.functions import USER_ERRORS, describe_error, load_function
from opd.config.reward import FunctionRewardConfig, GraderRewardConfig, RewardConfig
from opd.evaluate.grade import Grade, grader
from opd.types import Answer, Prompt

CompletionReward = Callable[[str, Answer | None], float]
"""(completion, answer) -> reward"""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardInput:
    """What a reward function judges: the text of a completion, and its prompt."""

    text: str
    prompt: Prompt


RewardFunction = Callable[[Sequence[RewardInput]], list[float]]
"""completions [B] -> rewards [B]"""

_ARGUMENTS: dict[str, Callable[[RewardInput], Any]] = {
    "completion": lambda each: each.text,
    "answer": lambda each: each.prompt.answer,
    "prompt": lambda each: each.prompt.text,
    "row": lambda each: dict(each.prompt.row),
}
_BATCHED = {f"{name}s": value for name, value in _ARGUMENTS.items()}


def reward_function(config: RewardConfig, evaluation: EvalConfig) -> RewardFunction:
    """The reward function of a run; ValueError when reward.function cannot be imported or called.

    What reward.function raises, and what it returns that is no finite number, becomes a ValueError.
    """
    match config:
        case GraderRewardConfig(grader=kind, marker=marker):
            chosen = kind or evaluation.grader
            graded = grade_reward(grader(chosen.value, marker or evaluation.marker))
            return lambda those: [graded(each.text, each.prompt.answer) for each in those]
        case FunctionRewardConfig(function=name):
            return _own_function(load_function("reward.function", name), name)
    raise AssertionError(f"no reward for {type(config).__name__}")


def grade_reward(grade: Grade) -> CompletionReward:
    """1 for a correct completion, 0 for a wrong one and for a prompt without an answer."""

    def reward(completion: str, answer: Answer | None) -> float:
        return 0.0 if answer is None else float(grade(completion, answer))

    return reward


def _own_function(function: Callable[..., Any], name: str) -> RewardFunction:
    """The user's function, called as its parameters say: see ``FunctionRewardConfig.function``."""
    parameters = _parameters(function)
    required = [p.name for p in parameters if p.default is p.empty]
    named = [p.name for p in parameters]
    if set(named) & _BATCHED.keys() and set(required) <= _BATCHED.keys():
        return _batched(function, name, [n for n in named if n in _BATCHED])
    if set(named) & _ARGUMENTS.keys() and set(required) <= _ARGUMENTS.keys():
        keys = [n for n in named if n in _ARGUMENTS]
        return _one_by_one(
            name, lambda each: function(**{key: _ARGUMENTS[key](each) for key in keys})
        )
    if len(required) > 2 or set(required) & (_ARGUMENTS.keys() | _BATCHED.keys()):
        raise ValueError(
            f"reward.function={name} has the parameters {', '.join(required)}; expected some of "
            f"{', '.join(_ARGUMENTS)}, or for all completions at once some of {', '.join(_BATCHED)}"
        )
    return _one_by_one(name, lambda each: function(each.text, each.prompt.answer))


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that can be given by name; none where a function of C does not list them."""
    try:
        found = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _one_by_one(name: str, call: Callable[[RewardInput], Any]) -> RewardFunction:
    def rewards(those: Sequence[RewardInput]) -> list[float]:
        returned = [_called(name, call, each, _whose(each)) for each in those]
        if any(inspect.isawaitable(value) for value in returned):
            returned = asyncio.run(_gathered(name, returned, those))
        return [
            _number(name, value, _whose(each)) for value, each in zip(returned, those, strict=True)
        ]

    return rewards


def _batched(function: Callable[..., Any], name: str, keys: Sequence[str]) -> RewardFunction:
    def call(those: Sequence[RewardInput]) -> Any:
        returned = function(**{key: [_BATCHED[key](each) for each in those] for key in keys})
        return asyncio.run(_awaited(returned)) if inspect.isawaitable(returned) else returned

    def rewards(those: Sequence[RewardInput]) -> list[float]:
        if not those:
            return []
        returned = _called(name, call, those, "")
        is_listed = hasattr(returned, "__len__") and not isinstance(returned, str | bytes | Mapping)
        if not is_listed or len(returned) != len(those):
            what = f"{len(returned)} values" if is_listed else f"a {type(returned).__name__}"
            raise ValueError(
                f"reward.function={name} returned {what} for {len(those)} completions; expected a list "
                "with one number for each"
            )
        return [
            _number(name, value, _whose(each)) for value, each in zip(returned, those, strict=True)
        ]

    return rewards


async def _awaited(value: Any) -> Any:
    return await value


async def _gathered(name: str, values: Sequence[Any], those: Sequence[RewardInput]) -> list[Any]:
    """All results of an async function; the calls run concurrently."""

    async def one(value: Any, each: RewardInput) -> Any:
        try:
            return await value if inspect.isawaitable(value) else value
        except USER_ERRORS as error:
            raise _failed(name, error, _whose(each)) from error

    return await asyncio.gather(*(one(v, each) for v, each in zip(values, those, strict=True)))


def _called(name: str, call: Callable[[Any], Any], argument: Any, whose: str) -> Any:
    try:
        return call(argument)
    except USER_ERRORS as error:
        raise _failed(name, error, whose) from error


def _failed(name: str, error: BaseException, whose: str) -> ValueError:
    return ValueError(
        f"{whose}reward.function={name} failed ({describe_error(error)}); correct the function"
    )


def _whose(completion: RewardInput) -> str:
    return f"a completion of prompt {completion.prompt.uid}: "


def _number(name: str, returned: Any, whose: str) -> float:
    """The reward as a number. ValueError when it is none, or not finite."""
    try:
        number = math.nan if isinstance(returned, str | bytes) else float(returned)
    except USER_ERRORS:  # whatever float() of a foreign object raises
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{whose}reward.function={name} returned {_shown(returned)} of type "
            f"{type(returned).__name__}; expected a finite number"
        )
    return number


def _shown(value: Any) -> str:
    try:
        return repr(str(value)[:60])
    except USER_ERRORS:
        return "an object"
