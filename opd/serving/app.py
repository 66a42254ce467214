"""What the applications of both services share: refusals, tokens, bodies."""

import hmac

from fastapi import FastAPI, Request, Response
from fastapi.responses import PlainTextResponse

MEDIA_TYPE = "application/octet-stream"


class Refusal(Exception):
    """A status below 500 and one clear sentence for the client."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def bare_app(title: str) -> FastAPI:
    """An application that answers refusals in plain text and has GET /health."""
    app = FastAPI(title=title, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return PlainTextResponse(str(refusal), status_code=refusal.status)

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok")

    return app


def require_token(request: Request, token: str | None, variable: str) -> None:
    """Refuse a request without the token; compared in constant time, so that nothing leaks."""
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refusal(401, f"the bearer token is missing or wrong; set {variable}")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is too large; the type keeps web pages from posting here."""
    if request.headers.get("content-type") != MEDIA_TYPE:
        raise Refusal(415, f"the content type must be {MEDIA_TYPE}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the request is larger than {limit} bytes")
        parts.append(part)
    return b"".join(parts)
