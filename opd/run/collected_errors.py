"""Errors of checks that do not depend on each other."""

from collections.abc import Iterator
from contextlib import contextmanager


class CollectedErrors:
    """Collects ValueErrors, to raise all of them as one; without ``collect`` the first ends the checks."""

    def __init__(self, *, collect: bool) -> None:
        self._collect = collect
        self._found: list[str] = []

    @contextmanager
    def each(self) -> Iterator[None]:
        """Inside is one check; later checks do not need what it computes."""
        try:
            yield
        except ValueError as error:
            if not self._collect:
                raise
            self._found.append(str(error))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside are all checks. Raises ValueError with one line for each error."""
        try:
            yield
        except ValueError as error:
            if not self._found:
                raise
            self._found.append(str(error))
        if self._found:
            raise ValueError("\n".join(self._found))
