"""The client's side of ``waiting.py``: read a response within its deadlines and its size."""

import time
from collections.abc import Iterator

import httpx

from opd.serving.waiting import WAITED

LONGEST_LINE = 64
"""Characters of a line about the wait."""
MAX_ERROR_BYTES = 1 << 16
"""Of a response that is no success, which are words."""


class Stalled(Exception):
    """A response that is not whole in time."""


class Oversized(Exception):
    """A response that is larger than its request allows, or compressed."""


class Deadline:
    """``timeout`` seconds, and again so many whenever the work before a request moves on.

    It moves when at least ``tokens``, the size of the request itself, were answered before it. So a
    request waits for at most ``timeout`` for every such share of what was ahead of it at first: the total
    follows the work, and a server that reports anything else is given up.
    """

    def __init__(self, timeout: float, tokens: int) -> None:
        self._timeout, self._tokens = timeout, max(1, tokens)
        self._ahead: int | None = None
        self.restart()

    def restart(self) -> None:
        """``timeout`` seconds from here."""
        self._end = time.monotonic() + self._timeout

    def move(self, ahead: int) -> None:
        """So many tokens are ahead of the request."""
        has_reached = self._ahead is not None and ahead == 0 < self._ahead
        if self._ahead is None or has_reached or ahead <= self._ahead - self._tokens:
            self._ahead = ahead
            self.restart()

    def check(self) -> None:
        """Raise Stalled when the time is over."""
        if time.monotonic() > self._end:
            raise Stalled


def receive(
    response: httpx.Response, *, timeout: float, max_bytes: int, tokens: int
) -> httpx.Response:
    """The whole response, without lines about the wait.

    Raises Stalled by the rule of ``Deadline``, and for a body that has not arrived ``timeout`` seconds
    after it began; Oversized for more than ``max_bytes``; httpx's errors.
    """
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise Oversized(f"it is compressed ({encoding}), which was not asked for")
    deadline = Deadline(timeout, tokens)
    chunks = _checked(response, deadline)
    status, length, first = response.status_code, None, b""
    if response.headers.get("content-type") == WAITED:
        status, length, first = _wait(chunks, deadline)
    limit = max_bytes if httpx.codes.is_success(status) else MAX_ERROR_BYTES
    parts, size = [first], len(first)
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            break
        parts.append(chunk)
    if size > limit:
        if httpx.codes.is_success(status):
            raise Oversized(f"it is larger than the {max_bytes} bytes that are possible")
        length = None  # the beginning of the words of an error is enough
    if length is not None and size != length:
        raise httpx.RemoteProtocolError(f"the response has {size} bytes of {length}")
    return httpx.Response(
        status,
        headers=[(k, v) for k, v in response.headers.multi_items() if k != "content-length"],
        content=b"".join(parts),
        request=response.request,
    )


def _checked(response: httpx.Response, deadline: Deadline) -> Iterator[bytes]:
    for chunk in response.iter_raw():
        deadline.check()
        yield chunk


def _wait(chunks: Iterator[bytes], deadline: Deadline) -> tuple[int, int, bytes]:
    """Read lines up to the status; the status, the length of what follows, and what of it has come."""
    text = b""
    for chunk in chunks:
        text += chunk
        while b"\n" in text[: LONGEST_LINE + 1]:
            line, text = text.split(b"\n", 1)
            match line.split():
                case [b"ahead", ahead] if ahead.isdigit():
                    deadline.move(int(ahead))
                case [b"status", status, length] if status.isdigit() and length.isdigit():
                    deadline.restart()
                    return int(status), int(length), text
                case _:
                    raise httpx.RemoteProtocolError(f"{line!r} is no line about a wait")
        if len(text) > LONGEST_LINE:
            raise httpx.RemoteProtocolError(f"{text[:LONGEST_LINE]!r} is no line about a wait")
    raise httpx.RemoteProtocolError("the response ended before its status")
