"""A response that may take long: its client sees that the line moves, and it ends when its client is gone.

The protocol. A response that is ready within ``PROGRESS_S`` is an ordinary one. Otherwise a response of
type ``WAITED`` begins: lines ``ahead N`` say how many tokens are ahead of the request, one every
``PROGRESS_S``; the line ``status S LENGTH`` and LENGTH bytes are then what an ordinary response would be.

So one connection and one request do everything. There is no ticket whose result somebody must fetch, a
server needs no memory of clients that are gone, and nothing is sent twice: the connection is the claim, and
when it closes the work is dropped. A client tells a long line from a dead server by ``ahead``, whatever
timeout a load balancer between them has for idle connections. See ``receiving.py`` for the client's side.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress

from fastapi import Response
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from opd.serving.app import Refusal, refusal_response

WAITED = "application/x-opd-waited"
"""Media type of a response that begins with lines about the wait."""
PROGRESS_S = 1.0
SEND_S = 300.0
"""A response that its client has not taken after so long is given up."""
CHUNK_S = 30.0
"""The same for one chunk of it: what is not taken holds memory that others wait for."""
CHUNK_BYTES = 1 << 20


class WaitingResponse(Response):
    """The response that ``answer`` makes of the body that ``read`` reads.

    ``answer`` is cancelled as soon as the client has closed its connection. The stack that it gets is
    closed when the response has been sent, or will never be. A ``Refusal`` of both is sent as such.
    """

    def __init__(
        self,
        read: Callable[[], Awaitable[bytes]],
        answer: Callable[[bytes, ExitStack], Awaitable[Response]],
        *,
        ahead: Callable[[], int],
        closing: ExitStack,
    ) -> None:
        super().__init__()
        self._read, self._answer = read, answer
        self._ahead, self._closing = ahead, closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with self._closing:
            working = asyncio.create_task(self._work(receive))
            try:
                is_waiting = await self._report_until_done(working, send)
                async with asyncio.timeout(SEND_S):
                    await _send_whole(working.result(), send, is_waiting)
            except (ClientDisconnect, TimeoutError):
                return  # nobody is there to read a response
            finally:
                working.cancel()

    async def _work(self, receive: Receive) -> Response:
        try:
            body = await self._read()
            leaving = asyncio.create_task(_wait_for_disconnect(receive))
            answering = asyncio.ensure_future(self._answer(body, self._closing))
            try:
                await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
                if not answering.done():
                    raise ClientDisconnect
                return answering.result()
            finally:
                answering.cancel()
                leaving.cancel()
        except Refusal as refusal:
            return refusal_response(refusal)

    async def _report_until_done(self, working: "asyncio.Task[Response]", send: Send) -> bool:
        """Send lines until ``working`` is done; whether there were any."""
        has_started = False
        while not (await asyncio.wait({working}, timeout=PROGRESS_S))[0]:
            if not has_started:
                await send(_start(200, [(b"content-type", WAITED.encode())]))
                has_started = True
            await send(_part(b"ahead %d\n" % self._ahead()))
        return has_started


class BoundedResponse(Response):
    """A response that is given up when its client does not take it in time."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SEND_S):
                await _send_whole(self, send, is_waiting=False)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_whole(response: Response, send: Send, is_waiting: bool) -> None:
    """Send a response, or after lines about the wait what it consists of, a chunk at a time."""
    body = bytes(response.body)
    if is_waiting:
        await send(_part(b"status %d %d\n" % (response.status_code, len(body))))
    else:
        await send(_start(response.status_code, response.raw_headers))
    for start in range(0, len(body), CHUNK_BYTES):
        async with asyncio.timeout(CHUNK_S):
            await send(_part(body[start : start + CHUNK_BYTES]))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    return {"type": "http.response.start", "status": status, "headers": headers}


def _part(data: bytes) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": True}
