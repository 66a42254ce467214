"""Weights into rollout servers, after every step: only what changed, over HTTP."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from opd.interfaces import Weights
from opd.serving.app import MEDIA_TYPE
from opd.serving.client import ServiceClient
from opd.sync.sparse import WeightSender
from opd.types import ReceiverState
from opd.world import World

MOST_MESSAGES = 6
"""To one receiver in one push; mask and patch are two, a snapshot after a refusal is one."""
WATCH_S = 1.0

log = logging.getLogger("opd.sync")


class ServerWeights:
    """Implements ``WeightSync`` for rollout servers: every rank reads the weights, rank 0 sends them.

    Nobody returns before every server has acknowledged. Between pushes rank 0 looks after servers
    that were started anew and sends them the version that the others have.
    ``ConnectionError`` when a server stays away, ``ValueError`` when it refuses snapshots.
    ``mark`` tells this rank's engine the version.
    """

    def __init__(
        self,
        servers: Sequence[ServiceClient],
        sender: WeightSender,
        *,
        mark: Callable[[int], None],
        world: World,
    ) -> None:
        self._sender, self._mark, self._world = sender, mark, world
        self._servers = {server: ReceiverState() for server in servers}
        self._lock = threading.Lock()
        self._watching = False

    def push(self, weights: Weights, version: int) -> Mapping[str, float]:
        told = {"sync/bytes": 0.0, "sync/changed": 0.0, "sync/snapshots": 0.0}
        if self._world.is_main:
            with self._lock:
                told = self._pushed(weights, version)
            self._watch()
        else:
            for _ in weights:
                pass
        told = self._world.sum(told)  # no rank is through before rank 0 has every answer
        self._mark(version)
        return told

    def _pushed(self, weights: Weights, version: int) -> dict[str, float]:
        self._sender.prepare(weights, version)
        with ThreadPoolExecutor(len(self._servers)) as pool:
            travelled = sum(pool.map(self._bring, list(self._servers)))
        self._sender.commit()
        return {
            "sync/bytes": float(travelled),
            "sync/changed": self._sender.changed,
            "sync/snapshots": float(self._sender.snapshots),
        }

    def _bring(self, server: ServiceClient) -> int:
        """Bytes that it took to bring one server to the sender's version."""
        travelled, held = 0, self._servers[server]
        for _ in range(MOST_MESSAGES):
            message = self._sender.next_for(held)
            if message is None:
                self._servers[server] = held
                return travelled
            answer = server.send("POST", "/weights", message, {"Content-Type": MEDIA_TYPE})
            held = ReceiverState(**answer.json())
            travelled += len(message)
        raise ValueError(
            f"the rollout server at {server.url} did not take version {self._sender.version} in "
            f"{MOST_MESSAGES} messages, last because {held.refused}: is another run sending to it?"
        )

    def _watch(self) -> None:
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._look_after, daemon=True, name="weights").start()

    def _look_after(self) -> None:
        pause = threading.Event()
        while not pause.wait(WATCH_S):
            for server in self._servers:
                try:
                    if self._is_behind(_held_by(server)):
                        self._catch_up(server)
                except (ConnectionError, ValueError) as error:
                    log.info("cannot look after %s: %s", server.url, error)

    def _catch_up(self, server: ServiceClient) -> None:
        """Ask again, now that no push is under way, and send what is missing."""
        with self._lock:
            held = _held_by(server)
            if self._is_behind(held):
                self._servers[server] = held
                self._bring(server)
                log.warning("%s was behind and has the weights again", server.url)

    def _is_behind(self, held: ReceiverState) -> bool:
        return (held.run, held.version) != (self._sender.run, self._sender.version)


def _held_by(server: ServiceClient) -> ReceiverState:
    return ReceiverState(**server.send("GET", "/info", retries=0).json()["held"])
