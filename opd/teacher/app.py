"""The endpoints of a teacher server: POST /score, GET /info, GET /head, GET /health."""

import asyncio
import logging
from dataclasses import asdict, replace

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from safetensors.numpy import save

from opd.config.teacher import TeacherServerConfig
from opd.serving.app import MEDIA_TYPE, Refusal, bare_app, failure, read_body, require_token
from opd.teacher.backend import Backend
from opd.teacher.response import require_answerable
from opd.teacher.scoring import folded_head
from opd.teacher.transport import bytes_per_target
from opd.teacher.wire import TOKEN_VARIABLE, WireRequest, read_request, response_bytes
from opd.teacher.work_queue import WorkQueue

log = logging.getLogger("opd.teacher")


def teacher_app(work: WorkQueue, config: TeacherServerConfig, *, token: str | None) -> FastAPI:
    """The application; ``token`` None admits every caller who reaches the port."""
    backend = work.backend()
    app = bare_app("opd teacher")

    @app.get("/info")
    async def info(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return JSONResponse(asdict(backend.info))

    @app.get("/head")
    async def head(request: Request, start: int, stop: int) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        limit = config.max_response_bytes
        return await asyncio.to_thread(_head_rows, backend, start, stop, limit)

    @app.post("/score")
    async def score(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        body = await read_body(request, config.max_request_bytes)
        limit = config.max_response_bytes
        wire_request = await asyncio.to_thread(_require_request, body, backend, limit)
        try:
            scores = await asyncio.wrap_future(work.submit(wire_request))
        except Exception as error:
            log.exception("scoring %d sequences failed", len(wire_request.lengths))
            return failure("scoring", error)
        return Response(await asyncio.to_thread(response_bytes, scores), media_type=MEDIA_TYPE)

    return app


def _head_rows(backend: Backend, start: int, stop: int, max_response_bytes: int) -> Response:
    """Rows ``start`` to ``stop`` of the output head, the model's logit scale included."""
    if not 0 <= start < stop <= backend.info.vocab_size:
        raise Refusal(400, f"rows {start} to {stop} are not in 0 to {backend.info.vocab_size}")
    if 4 * (stop - start) * backend.info.hidden_size > max_response_bytes:
        raise Refusal(413, f"{stop - start} rows are more than {max_response_bytes} bytes")
    spec = replace(backend.spec, vocab_size=stop - start)
    rows_VD = folded_head(backend.head_VD[start:stop], spec)
    return Response(save({"head": rows_VD.numpy()}), media_type=MEDIA_TYPE)


def _require_request(body: bytes, backend: Backend, max_response_bytes: int) -> WireRequest:
    """The request in ``body``; Refusal when it is malformed or its response would be too large."""
    try:
        request = read_request(body)
        require_answerable(request, backend.info, backend.spec)
    except ValueError as error:
        raise Refusal(400, str(error)) from error
    targets = int((request.lengths - request.starts).sum())
    size = targets * bytes_per_target(
        backend.info,
        want=request.want,
        hidden_dtype=request.hidden_dtype,
        support=request.support_width(),
        vocab_size=request.vocab_size,
    )
    if size > max_response_bytes:
        raise Refusal(
            413,
            f"the response for {targets} tokens would be {size} bytes, at most "
            f"{max_response_bytes} are sent; request fewer tokens, or a top_k",
        )
    return request
