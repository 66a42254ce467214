"""Requests in order of arrival: how much work is ahead of each, and whose body is read next."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

FRESH_S = 0.5
"""So long ``ahead`` is not counted again: thousands of places want to know it every second."""
BYTES_PER_TOKEN = 4
"""The fewest that a request can have: a body of so many bytes has at most a quarter as many tokens."""


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """One request's: the size of its body, its tokens, and whether its body may be read."""

    size: int
    tokens: int
    is_admitted: bool = False


class AdmissionQueue:
    """The open requests of a service, first come, first served.

    A request takes its place before its body is read, and waits until the bodies that are held leave
    room for it: at most ``max_bytes``, or one alone. What waits beyond that stays with its client, since
    nobody reads its socket. In this order ``ahead`` of a place can only fall, so a client can tell a line
    that moves from a server that has stopped. It is fair as long as clients keep equally many requests
    open, as ``ServerTeacher`` does. Used by the event loop only.
    """

    def __init__(self, max_bytes: int, *, fresh_s: float = FRESH_S) -> None:
        self._max_bytes, self._fresh_s = max_bytes, fresh_s
        self._places: dict[QueuedRequest, asyncio.Event] = {}
        self._ahead: dict[QueuedRequest, int] = {}
        self._counted = -fresh_s

    def join(self, size: int) -> QueuedRequest:
        """A place at the end, for a request with a body of ``size`` bytes."""
        place = QueuedRequest(size, tokens=size // BYTES_PER_TOKEN)
        self._places[place] = asyncio.Event()
        self._admit()
        return place

    async def wait_until_admitted(self, place: QueuedRequest) -> None:
        """Return when the body may be read."""
        await self._places[place].wait()

    def leave(self, place: QueuedRequest) -> None:
        """Give up a place, whether the request has been answered or not."""
        if self._places.pop(place, None) is not None:
            self._admit()

    def ahead(self, place: QueuedRequest) -> int:
        """Tokens of the requests before ``place``; the most there can be, for bodies that are not read."""
        now = time.monotonic()
        if place not in self._ahead or now - self._counted >= self._fresh_s:
            tokens, self._ahead, self._counted = 0, {}, now
            for other in self._places:
                self._ahead[other] = tokens
                tokens += other.tokens
        return self._ahead[place]

    def follow(self, place: QueuedRequest) -> Callable[[], int]:
        """``ahead`` of one place."""
        return lambda: self.ahead(place)

    def _admit(self) -> None:
        held = sum(place.size for place in self._places if place.is_admitted)
        for place, event in self._places.items():
            if place.is_admitted:
                continue
            if held and held + place.size > self._max_bytes:
                return
            place.is_admitted = True
            held += place.size
            event.set()
