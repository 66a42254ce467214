"""What SIGTERM and SIGHUP do to a run: the step in progress is finished and saved, then all ends."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from opd.faults import RunError

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """The signal that asked this process to end, once there is one.

    While ``finishes_step`` is true the first signal is only noted; otherwise, and from the second on, a
    signal raises RunError in the main thread, so that everything that was started is ended.
    """

    def __init__(self) -> None:
        self.finishes_step = False
        self.name: str | None = None

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.name is not None

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Inside, signals are handled here; other threads than the main one receive none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.name, self.finishes_step = None, False
        before = {each: signal.signal(each, self._note) for each in SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self.name = self.name is None, signal.Signals(number).name
        if not (self.finishes_step and first):
            raise RunError(
                f"ended by {self.name}; the same command goes on from the last checkpoint"
            )
        print(
            f"{self.name}: the step in progress is finished and saved; a second signal ends at once",
            file=sys.stderr,
            flush=True,
        )


STOP = StopRequest()
"""That of this process."""
