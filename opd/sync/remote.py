"""Weights into rollout servers, after every step: only what changed, over HTTP."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from opd.interfaces import Weights
from opd.serving.app import MEDIA_TYPE
from opd.serving.client import ServiceClient, parsed
from opd.sync.sender import WeightSender
from opd.types import ReceiverState
from opd.world import World

MAX_MESSAGES = 6
"""To one receiver in one push; mask and patch are two, a snapshot after a refusal is one."""
POLL_S = 1.0
STATE = "the state of a rollout server's weights"

log = logging.getLogger("opd.sync")


class ServerWeights:
    """Implements ``WeightSync`` for rollout servers: every rank reads the weights, rank 0 sends them.

    No rank returns before every server has acknowledged. Between pushes rank 0 polls the servers and
    sends restarted ones the version that the others have. ``mark`` sets the version that this rank's
    engine expects. ``ConnectionError`` when a server cannot be reached, ``ValueError`` when it refuses
    snapshots. ``poll_s`` is the time between polls; None: servers are not polled.
    """

    def __init__(
        self,
        servers: Sequence[ServiceClient],
        sender: WeightSender,
        *,
        mark: Callable[[int], None],
        world: World,
        poll_s: float | None = POLL_S,
    ) -> None:
        self._poll_s = poll_s
        self._sender, self._mark, self._world = sender, mark, world
        self._servers = {server: ReceiverState() for server in servers}
        self._lock = threading.Lock()
        self._is_polling = False

    def whole(self) -> "ServerWeights":
        """A sync of the same run to the same servers that sends whole weights and does not poll.

        What it sent is replaced by the first push of this one.
        """
        return ServerWeights(
            list(self._servers),
            self._sender.whole(),
            mark=self._mark,
            world=self._world,
            poll_s=None,
        )

    def push(self, weights: Weights, version: int) -> Mapping[str, float]:
        metrics = {"sync/bytes": 0.0, "sync/changed": 0.0, "sync/snapshots": 0.0}
        if self._world.is_main:
            with self._lock:
                metrics = self._push_to_servers(weights, version)
            self._start_polling()
        else:
            for _ in weights:
                pass
        metrics = self._world.sum(metrics)  # no rank goes on before rank 0 has every response
        self._mark(version)
        return metrics

    def _push_to_servers(self, weights: Weights, version: int) -> dict[str, float]:
        self._sender.prepare(weights, version)
        with ThreadPoolExecutor(len(self._servers)) as pool:
            sent = sum(pool.map(self._update, list(self._servers)))
        self._sender.commit()
        return {
            "sync/bytes": float(sent),
            "sync/changed": self._sender.changed,
            "sync/snapshots": float(self._sender.snapshots),
        }

    def _update(self, server: ServiceClient) -> int:
        """Bring one server to the sender's version; returns the bytes sent."""
        sent, state = 0, self._servers[server]
        for _ in range(MAX_MESSAGES):
            message = self._sender.next_for(state)
            if message is None:
                self._servers[server] = state
                return sent
            response = server.send("POST", "/weights", message, {"Content-Type": MEDIA_TYPE})
            state = parsed(response, lambda r: ReceiverState(**r.json()), STATE)
            sent += len(message)
        raise ValueError(
            f"the rollout server at {server.url} did not take version {self._sender.version} in "
            f"{MAX_MESSAGES} messages, last because {state.refused}: is another run sending to it?"
        )

    def _start_polling(self) -> None:
        if self._poll_s is not None and not self._is_polling:
            self._is_polling = True
            threading.Thread(target=self._poll, daemon=True, name="weights").start()

    def _poll(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._poll_s):
            for server in self._servers:
                try:
                    if self._is_behind(_read_state(server)):
                        self._catch_up(server)
                except (ConnectionError, ValueError) as error:
                    log.info("cannot poll %s: %s", server.url, error)

    def _catch_up(self, server: ServiceClient) -> None:
        """Read the state again, now that no push is running, and send what is missing."""
        with self._lock:
            state = _read_state(server)
            if self._is_behind(state):
                self._servers[server] = state
                self._update(server)
                log.warning("%s was behind and has been updated", server.url)

    def _is_behind(self, state: ReceiverState) -> bool:
        return (state.run, state.version) != (self._sender.run, self._sender.version)


def _read_state(server: ServiceClient) -> ReceiverState:
    response = server.send("GET", "/info", retries=0)
    return parsed(response, lambda r: ReceiverState(**r.json()["receiver"]), STATE)
