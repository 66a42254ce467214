"""schedule=sync: a step's rollouts are written, then scored, then learned from, by the newest weights."""

from collections.abc import Callable

from opd.interfaces import StepBatch
from opd.phases import RunPhase
from opd.schedule.writing import StepWriter


class Synchronous:
    """Implements ``Schedule``; nothing runs beside the learner, and nothing needs to be saved.

    ``enter`` is told when the teacher's turn begins.
    """

    def __init__(self, writer: StepWriter, enter: Callable[[RunPhase, int], None]) -> None:
        self._writer = writer
        self._enter = enter

    def batch(self, step: int) -> StepBatch:
        """See ``Schedule``."""
        rollouts, times = self._writer.write(step)
        self._enter(RunPhase.teacher, step)
        return self._writer.score(rollouts, times)

    def finish(self) -> dict[str, float]:
        """See ``Schedule``."""
        return {}

    def save(self, folder: str) -> None:
        """See ``Schedule``."""

    def load(self, folder: str, step: int) -> None:
        """See ``Schedule``."""
