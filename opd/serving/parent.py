"""A child process ends when the process that started it is gone, even if that ended before it looked."""

import os
import threading
import time
from collections.abc import Callable

PARENT = "OPD_PARENT_PID"
"""Environment variable with the process id of the parent: getppid() is another's once that has ended."""
POLL_S = 0.5


def parent_variable() -> dict[str, str]:
    """What a child of this process needs in its environment."""
    return {PARENT: str(os.getpid())}


def watch_parent(end: Callable[[], None]) -> None:
    """Call ``end`` in a thread once the parent is gone, at once where it has gone already."""
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        end()

    threading.Thread(target=watch, daemon=True).start()
