"""Push weights only when evaluation or verification needs them: for runs without on-policy rollouts."""

from collections.abc import Callable, Mapping

from opd.interfaces import Weights, WeightSync


class NoSync:
    """A ``WeightSync`` without an engine."""

    def push(self, weights: Weights, version: int) -> Mapping[str, float]:
        """See ``WeightSync``; the weights are not gathered."""
        return {}


class PeriodicSync:
    """A ``WeightSync`` that pushes the first time and whenever ``due(version)``."""

    def __init__(self, inner: WeightSync, due: Callable[[int], bool]) -> None:
        self._inner = inner
        self._due = due
        self._first = True

    def push(self, weights: Weights, version: int) -> Mapping[str, float]:
        """See ``WeightSync``; a version that is not due is not gathered."""
        if not (self._first or self._due(version)):
            return {}
        self._first = False
        return self._inner.push(weights, version)
