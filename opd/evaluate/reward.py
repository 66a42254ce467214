"""Rewards: what a verifier says about one completion."""

import importlib
from collections.abc import Callable
from typing import cast

from opd.evaluate.grade import Grade

RewardFunction = Callable[[str, str | None], float]
"""(completion, answer) -> reward"""


def graded(grade: Grade) -> RewardFunction:
    """1 for a right answer and 0 for a wrong one, or where there is none to compare with."""

    def reward(completion: str, answer: str | None) -> float:
        return 0.0 if answer is None else float(grade(completion, answer))

    return reward


def named_function(name: str) -> RewardFunction:
    """``module:name`` -> that function. ValueError when it cannot be imported or called."""
    module, colon, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward.function={name} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(
            f"reward.function={name}: expected module:name of a function (completion, answer) -> float"
        )
    return cast(RewardFunction, found)
