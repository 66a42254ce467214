"""A teacher that is awake only while the ranks score, because it shares their cards."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from opd.interfaces import Teacher
from opd.serving.client import ServiceClient
from opd.types import FloatArray, Rollout, ScoredRollout, TeacherInfo
from opd.world import World

log = logging.getLogger("opd.teacher")


class SleepSwitch:
    """Puts all servers of a teacher to sleep and wakes them, at the same time.

    ``ValueError`` when a server does not sleep. A server that is gone has left its card, and is passed
    over: the teacher's client knows whether another can take its requests.
    """

    def __init__(self, servers: Sequence[ServiceClient]) -> None:
        self._servers = list(servers)

    def wake(self) -> None:
        """Return when every server is awake."""
        self._post("/wake_up")

    def sleep(self) -> None:
        """Return when every server has left its card. ``ConnectionError`` when one answers and has not."""
        self._post("/sleep")

    def _post(self, path: str) -> None:
        with ThreadPoolExecutor(len(self._servers)) as pool:
            for _ in pool.map(lambda server: _post_if_running(server, path), self._servers):
                pass


class SleepingTeacher:
    """A ``Teacher`` whose ``score`` is collective: its servers are awake between two barriers.

    No rank scores before all have finished what they did before, and none goes on before the servers
    sleep. Rank 0 wakes them and puts them to sleep. The barrier after that is needed for memory, and for
    vLLM, which checks that a card has more free memory after it fell asleep than before. Heads that the
    learner will need are fetched before the servers sleep: ``keep_head`` takes the name of a teacher.
    """

    def __init__(
        self,
        teacher: Teacher,
        switch: SleepSwitch,
        *,
        world: World,
        keep_head: Callable[[str | None], object],
    ) -> None:
        self._teacher, self._switch = teacher, switch
        self._world, self._keep_head = world, keep_head

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``; collective, so a rank without rollouts calls it too."""
        self._world.barrier()
        if self._world.is_main:
            self._switch.wake()
        scored = self._teacher.score(rollouts)
        for name in sorted(
            {s.rollout.prompt.teacher for s in scored if s.hidden is not None}, key=str
        ):
            self._keep_head(name)
        self._world.barrier()
        if self._world.is_main:
            self._switch.sleep()
        self._world.barrier()
        return scored

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._teacher.info()

    def head(self, name: str | None = None) -> FloatArray:
        """See ``Teacher``; a server wakes for it and stays awake until the next ``score`` ends."""
        return self._teacher.head(name)


def _post_if_running(server: ServiceClient, path: str) -> None:
    try:
        server.send("POST", path)
    except ConnectionError as error:
        if _is_running(server):
            raise
        log.warning("%s: %s", path, error)


def _is_running(server: ServiceClient) -> bool:
    try:
        server.send("GET", "/health", retries=0)
    except (ConnectionError, ValueError):
        return False
    return True
