"""A service that is started again when it has died or does not answer."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx

from opd.faults import RunError
from opd.serving.child import RunningService

POLL_S = 0.5
HEALTH_S = 2.0
"""Between two requests for a sign of life."""
ANSWER_S = 5.0
"""For its response."""
UNWATCHED_S = 15.0
"""If so much time passes between two looks, the watcher itself was stopped, and it is not counted."""
LEAVING_S = 1.0
"""A service that ended is looked at after so long: the whole run may be ending."""


class ServiceSupervisor:
    """Watches one service in a thread; ``failure`` is a sentence once it is given up.

    A service is given up after ``restarts`` restarts, or when one does not succeed; connections to it
    are then refused. It does not answer when GET /health fails for ``silent_s`` seconds (0: never).
    """

    def __init__(
        self, service: RunningService, name: str, *, restarts: int, silent_s: float, log: str
    ) -> None:
        self.service, self.failure, self.is_ready = service, "", True
        self._name, self._restarts, self._silent_s, self._log = name, restarts, silent_s, log
        self._used = 0
        self._stop = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name=f"watch {name}").start()

    def stop(self) -> None:
        """The service may end from here on."""
        self._stop.set()

    def _watch(self) -> None:
        answered_at = looked_at = time.monotonic()
        while not self._stop.wait(POLL_S):
            now = time.monotonic()
            if now - looked_at > UNWATCHED_S:
                answered_at = now
            looked_at = now
            fault = self._fault()
            if fault is None and self._silent_s and now - answered_at > HEALTH_S:
                if self._answers():
                    answered_at = time.monotonic()
                elif time.monotonic() - answered_at > self._silent_s:
                    fault = f"gave no sign of life for {self._silent_s:g} s"
            if fault is None:
                continue
            if self._stop.wait(LEAVING_S) or not self._restart(fault):
                return
            answered_at = looked_at = time.monotonic()

    def _fault(self) -> str | None:
        status = self.service.status()
        if status is None:
            return None
        return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"

    def _answers(self) -> bool:
        try:
            with httpx.Client(trust_env=False, timeout=ANSWER_S) as client:
                client.get(f"{self.service.url}/health")
        except httpx.HTTPError:
            return False
        return True

    def _restart(self, fault: str) -> bool:
        self.is_ready = False
        what = f"the {self._name} {fault}"
        if self._used == self._restarts:
            self._give_up(f"{what}, after {self._used} restarts; see {self._log}")
            return False
        self._used += 1
        print(
            f"opd: {what}: it is started again ({self._used} of {self._restarts} restarts)",
            file=sys.stderr,
            flush=True,
        )
        try:
            self.service.restart()
        except RunError:
            if self._stop.is_set():
                return False
            return self._restart("ended before it was ready")
        self.is_ready = True
        return True

    def _give_up(self, sentence: str) -> None:
        if not self._stop.is_set():
            self.service.close()
            self.failure = sentence


@contextmanager
def supervised_service(
    starting: AbstractContextManager[RunningService],
    name: str,
    *,
    restarts: int,
    silent_s: float,
    log: str,
) -> Iterator[ServiceSupervisor]:
    """A supervisor of the service that ``starting`` starts, until the context ends."""
    with starting as service:
        supervisor = ServiceSupervisor(service, name, restarts=restarts, silent_s=silent_s, log=log)
        try:
            yield supervisor
        finally:
            supervisor.stop()
