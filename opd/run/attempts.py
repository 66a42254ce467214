"""Checks one after the other: the first error ends them, or all errors are collected."""

from collections.abc import Callable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Attempts(Protocol):
    """Runs checks that raise ValueError."""

    def make(self, check: Callable[[], T]) -> T | None:
        """What ``check`` returns; None when it failed and the checks go on."""
        ...

    def require_none_failed(self) -> None:
        """ValueError with a sentence for each check that failed."""
        ...


class FirstError:
    """Implements ``Attempts``: the first error is raised."""

    def make(self, check: Callable[[], T]) -> T | None:
        return check()

    def require_none_failed(self) -> None:
        """Nothing to do."""


class EveryError:
    """Implements ``Attempts``: errors are collected, each sentence once."""

    def __init__(self) -> None:
        self._errors: dict[str, None] = {}

    def make(self, check: Callable[[], T]) -> T | None:
        try:
            return check()
        except ValueError as error:
            self._errors[str(error)] = None
            return None

    def require_none_failed(self) -> None:
        if self._errors:
            raise ValueError("\n".join(self._errors))
