"""schedule=sync: a step's rollouts are written, then scored, then learned from, by the newest weights."""

from opd.interfaces import StepBatch
from opd.schedule.writing import StepWriter


class Synchronous:
    """Implements ``Schedule``; nothing runs beside the learner, and nothing needs to be saved."""

    def __init__(self, writer: StepWriter) -> None:
        self._writer = writer

    def batch(self, step: int) -> StepBatch:
        """See ``Schedule``."""
        return self._writer.write(step)

    def finish(self) -> dict[str, float]:
        """See ``Schedule``."""
        return {}

    def save(self, folder: str) -> None:
        """See ``Schedule``."""

    def load(self, folder: str, step: int) -> None:
        """See ``Schedule``."""
