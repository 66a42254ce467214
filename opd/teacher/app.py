"""The teacher's doors: POST /score, GET /info, GET /head, GET /health."""

import asyncio
import hmac
import logging
from dataclasses import asdict, replace

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from safetensors.numpy import save

from opd.teacher.answer import bytes_per_target, require_answerable
from opd.teacher.scoring import folded_head
from opd.teacher.wire import MEDIA_TYPE, ScoreRequest, answer_bytes, read_request
from opd.teacher.work import WorkQueue

log = logging.getLogger("opd.teacher")


class Refusal(Exception):
    """A status below 500 and one clear sentence for the client."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


def teacher_app(
    work: WorkQueue, *, token: str | None, max_body_bytes: int, max_answer_bytes: int
) -> FastAPI:
    """The application; ``token`` None lets in everybody who reaches the port."""
    backend = work.backend()
    app = FastAPI(title="opd teacher", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return PlainTextResponse(str(refusal), status_code=refusal.status)

    @app.get("/health")
    async def health() -> Response:
        return PlainTextResponse("ok")

    @app.get("/info")
    async def info(request: Request) -> Response:
        _require_token(request, token)
        return JSONResponse(asdict(backend.info) | {"linear_head": backend.spec.softcap is None})

    @app.get("/head")
    async def head(request: Request, start: int, stop: int) -> Response:
        _require_token(request, token)
        return await asyncio.to_thread(_head, start, stop)

    def _head(start: int, stop: int) -> Response:
        if not 0 <= start < stop <= backend.info.vocab_size:
            raise Refusal(400, f"rows {start} to {stop} are not in 0 to {backend.info.vocab_size}")
        if 4 * (stop - start) * backend.info.hidden_size > max_answer_bytes:
            raise Refusal(413, f"{stop - start} rows are more than {max_answer_bytes} bytes")
        rows_VD = folded_head(
            backend.head_VD[start:stop], replace(backend.spec, vocab_size=stop - start)
        )
        return Response(save({"head": rows_VD.numpy()}), media_type=MEDIA_TYPE)

    @app.post("/score")
    async def score(request: Request) -> Response:
        _require_token(request, token)
        body = await _body(request, max_body_bytes)
        asked = await asyncio.to_thread(read, body)
        try:
            answer = await asyncio.wrap_future(work.submit(asked))
        except Exception as error:
            log.exception("scoring %d sequences failed", len(asked.lengths))
            return PlainTextResponse(f"scoring failed: {error}", status_code=500)
        return Response(await asyncio.to_thread(answer_bytes, answer), media_type=MEDIA_TYPE)

    def read(body: bytes) -> ScoreRequest:
        try:
            asked = read_request(body)
            require_answerable(asked, backend.info, backend.spec)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        targets = int((asked.lengths - asked.starts).sum())
        size = targets * bytes_per_target(asked, backend.info.hidden_size)
        if size > max_answer_bytes:
            raise Refusal(
                413,
                f"the answer about {targets} tokens would be {size} bytes, at most "
                f"{max_answer_bytes} are sent; ask about fewer tokens or for a top_k",
            )
        return asked

    return app


def _require_token(request: Request, token: str | None) -> None:
    """Constant time, so that a wrong token tells nothing of the right one."""
    given = request.headers.get("authorization", "")
    if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise Refusal(401, "the bearer token is missing or wrong; set OPD_TEACHER_TOKEN")


async def _body(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is too large; the type keeps web pages from posting here."""
    if request.headers.get("content-type") != MEDIA_TYPE:
        raise Refusal(415, f"the content type must be {MEDIA_TYPE}")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise Refusal(413, f"the request is larger than {limit} bytes; send fewer sequences")
        parts.append(part)
    return b"".join(parts)
