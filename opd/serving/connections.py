"""The connections of a service: a bounded number, in order of arrival, and none for a silent client."""

import asyncio
import logging
import resource
import socket
from typing import Any

import uvicorn

MAX_CONNECTIONS = 4096
"""Further ones wait in the listener's queue until one ends."""
FILES = 256
"""File descriptors that are left to the rest of the process."""
SILENT_S = 10.0
"""A connection without a request, or with an unfinished header, is closed after so long."""
CROWDED_S = 1.0
"""The same where another connection waits for its place."""
CLOSING_S = 30.0
"""A closed connection whose client does not read what is left of its response ends after so long."""
SWEEP_S = 0.25

log = logging.getLogger("opd.serving")


def allow_connections(most: int = MAX_CONNECTIONS) -> int:
    """Raise this process's limit of open files as far as needed and allowed; the connections it can hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most + FILES if hard == resource.RLIM_INFINITY else min(most + FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, soft - FILES))


class BoundedServer(uvicorn.Server):
    """A uvicorn server that accepts a connection only when it has a place for it.

    uvicorn's own limit answers with 503, also to clients with a token when those without have taken
    every place, and it lets a client that sends nothing keep its connection. Here a connection without
    an open request loses its place: after ``SILENT_S``, and after ``CROWDED_S`` when there is none left.
    """

    def __init__(self, config: uvicorn.Config, *, max_connections: int) -> None:
        super().__init__(config)
        self._max_connections = max_connections
        self._silent_sweeps: dict[Any, int] = {}
        self._closing_sweeps: dict[Any, int] = {}
        self._loops: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without uvicorn's listeners, and accept from ``sockets`` instead."""
        assert sockets, "the sockets are bound before"
        await super().startup(sockets=[])
        self._loops = [asyncio.create_task(self._accept(each)) for each in sockets]
        self._loops.append(asyncio.create_task(self._sweep_for_ever()))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, then as uvicorn does."""
        for task in self._loops:
            task.cancel()
        await super().shutdown(sockets)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            while len(self.server_state.connections) >= self._max_connections:
                await asyncio.sleep(SWEEP_S)
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:  # no file descriptor is free, or it was reset before
                log.warning("a connection could not be accepted: %s", error)
                await asyncio.sleep(SWEEP_S)
                continue
            try:
                await loop.connect_accepted_socket(self._protocol, accepted)
            except OSError:  # it has been reset
                accepted.close()

    def _protocol(self) -> asyncio.Protocol:
        """uvicorn's protocol of one connection."""
        protocol: Any = self.config.http_protocol_class
        return protocol(
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def _sweep_for_ever(self) -> None:
        while True:
            is_crowded = len(self.server_state.connections) >= self._max_connections
            self._close_silent(CROWDED_S if is_crowded else SILENT_S)
            self._close_unread(CROWDED_S if is_crowded else CLOSING_S)
            await asyncio.sleep(SWEEP_S)

    def _close_silent(self, seconds: float) -> None:
        """Close the connections on which no request has been open for so long.

        Sweeps are counted, not time: between two of them the loop reads what has arrived, however busy
        the machine is.
        """
        connections: set[Any] = self.server_state.connections  # uvicorn has a class for each parser
        silent = [c for c in connections if c.cycle is None or c.cycle.response_complete]
        self._silent_sweeps = _abort_old(self._silent_sweeps, silent, seconds)

    def _close_unread(self, seconds: float) -> None:
        """Abort the connections that have been closed for so long and still hold a part of a response."""
        connections: set[Any] = self.server_state.connections
        closing = [c for c in connections if c.transport.is_closing()]
        self._closing_sweeps = _abort_old(self._closing_sweeps, closing, seconds)


def _abort_old(sweeps: dict[Any, int], found: list[Any], seconds: float) -> dict[Any, int]:
    """Count a sweep for each connection, and end those of more than ``seconds``; the counts."""
    counted = {connection: sweeps.get(connection, 0) + 1 for connection in found}
    for connection, number in counted.items():
        if number > seconds / SWEEP_S:
            connection.transport.abort()
    return counted
