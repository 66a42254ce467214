"""What the applications of all services share: refusals, bearer tokens, request bodies."""

import hmac

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

MEDIA_TYPE = "application/octet-stream"


class Refusal(Exception):
    """A response with a status below 500 and a one-line reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def bare_app(title: str) -> FastAPI:
    """An application that sends refusals as plain text and has GET /health."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return PlainTextResponse(str(refusal), status_code=refusal.status)

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok")

    return app


def require_token(request: Request, token: str | None, variable: str) -> None:
    """Refuse a request without the token; the comparison takes constant time, so that nothing leaks."""
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refusal(401, f"the bearer token is missing or wrong; set {variable}")


def failure(what: str, error: Exception) -> Response:
    """The response to a request that a server could not do: status 500, and the error in one line."""
    words = " ".join(str(error).split())
    return PlainTextResponse(f"{what} failed: {type(error).__name__}: {words}", status_code=500)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused as soon as it is too large; the content type keeps web pages from posting here."""
    if request.headers.get("content-type") != MEDIA_TYPE:
        raise Refusal(415, f"the content type must be {MEDIA_TYPE}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refusal(
                413,
                f"the request is larger than {limit} bytes: start the server with a larger "
                "max_request_bytes",
            )
        parts.append(part)
    return b"".join(parts)
