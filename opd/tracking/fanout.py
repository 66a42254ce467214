"""Several trackers as one."""

from collections.abc import Mapping, Sequence
from typing import Any

from opd.interfaces import Tracker


class Trackers:
    """A ``Tracker`` that forwards every call to each of ``trackers``; with none it does nothing."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for one step."""
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few transcripts of one evaluation."""
        for tracker in self._trackers:
            tracker.log_samples(step, samples)

    def close(self) -> None:
        """Close each tracker."""
        for tracker in self._trackers:
            tracker.close()
