"""What the applications of all services share: refusals, bearer tokens, request bodies."""

import asyncio
import hmac
from collections.abc import Callable

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse

MEDIA_TYPE = "application/octet-stream"
MOST_CHARACTERS = 500
"""Of a refusal: it may repeat what a client sent."""
BODY_S = 60.0
BODY_BYTES_PER_S = 4 << 20
"""A body is refused that has not arrived after ``BODY_S`` and the time that it takes at this rate."""


class Refusal(Exception):
    """A response with a status below 500 and a one-line reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def bare_app(title: str, fault: Callable[[], str | None] = lambda: None) -> FastAPI:
    """An application that sends refusals as plain text and has GET /health.

    That has status 503 while ``fault`` names a reason why no other request would be answered.
    """
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return refusal_response(refusal)

    @app.exception_handler(RequestValidationError)
    async def refuse_parameters(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return refusal_response(Refusal(400, f"{field}: {first['msg']}"))

    @app.get("/health")
    async def health() -> Response:
        reason = fault()
        return PlainTextResponse(reason or "ok", status_code=503 if reason else 200)

    return app


def refusal_response(refusal: Refusal) -> Response:
    """The refusal as plain text, in one line, of which a foreign value makes at most a part."""
    words = " ".join(str(refusal).split())
    return PlainTextResponse(words[:MOST_CHARACTERS], status_code=refusal.status)


def require_token(request: Request, token: str | None, variable: str) -> None:
    """Refuse a request without the token; the comparison takes constant time, so that nothing leaks."""
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refusal(401, f"the bearer token is missing or wrong; set {variable}")


def failure(what: str, error: Exception) -> Response:
    """The response to a request that a server could not do: status 500, and the error in one line."""
    words = " ".join(str(error).split())
    return PlainTextResponse(f"{what} failed: {type(error).__name__}: {words}", status_code=500)


def require_body(request: Request, limit: int) -> int:
    """The size of the body that will follow, before any of it is read; ``limit`` where it is not given.

    Raises Refusal for a size above ``limit``, and for another content type, which web pages cannot set.
    """
    if request.headers.get("content-type") != MEDIA_TYPE:
        raise Refusal(415, f"the content type must be {MEDIA_TYPE}")
    given = request.headers.get("content-length")
    if given is None:
        return limit
    _require_size(int(given) if given.isdecimal() else limit + 1, limit)
    return int(given)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is too large or too slow."""
    seconds = BODY_S + require_body(request, limit) / BODY_BYTES_PER_S
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                size += len(part)
                _require_size(size, limit)
                parts.append(part)
    except TimeoutError:
        raise Refusal(408, f"the request had not arrived after {seconds:.0f} s") from None
    return b"".join(parts)


def _require_size(size: int, limit: int) -> None:
    if size > limit:
        raise Refusal(
            413,
            f"the request is larger than {limit} bytes: start the server with a larger "
            "max_request_bytes",
        )
