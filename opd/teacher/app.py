"""The endpoints of a teacher server: POST /score, GET /info, GET /head, GET /health."""

import asyncio
import logging
from dataclasses import asdict, replace

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from safetensors.numpy import save

from opd.config.teacher import TeacherServerConfig
from opd.serving.app import MEDIA_TYPE, Refusal, bare_app, read_body, require_token
from opd.teacher.response import require_answerable
from opd.teacher.scoring import folded_head
from opd.teacher.transport import bytes_per_target
from opd.teacher.wire import TOKEN_VARIABLE, WireRequest, answer_bytes, read_request
from opd.teacher.work_queue import WorkQueue

log = logging.getLogger("opd.teacher")


def teacher_app(work: WorkQueue, config: TeacherServerConfig, *, token: str | None) -> FastAPI:
    """The application; ``token`` None lets in everybody who reaches the port."""
    backend = work.backend()
    app = bare_app("opd teacher")

    @app.get("/info")
    async def info(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return JSONResponse(asdict(backend.info))

    @app.get("/head")
    async def head(request: Request, start: int, stop: int) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return await asyncio.to_thread(_head, start, stop)

    def _head(start: int, stop: int) -> Response:
        if not 0 <= start < stop <= backend.info.vocab_size:
            raise Refusal(400, f"rows {start} to {stop} are not in 0 to {backend.info.vocab_size}")
        if 4 * (stop - start) * backend.info.hidden_size > config.max_response_bytes:
            raise Refusal(
                413, f"{stop - start} rows are more than {config.max_response_bytes} bytes"
            )
        rows_VD = folded_head(
            backend.head_VD[start:stop], replace(backend.spec, vocab_size=stop - start)
        )
        return Response(save({"head": rows_VD.numpy()}), media_type=MEDIA_TYPE)

    @app.post("/score")
    async def score(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        body = await read_body(request, config.max_request_bytes)
        asked = await asyncio.to_thread(read, body)
        try:
            answer = await asyncio.wrap_future(work.submit(asked))
        except Exception as error:
            log.exception("scoring %d sequences failed", len(asked.lengths))
            return PlainTextResponse(f"scoring failed: {error}", status_code=500)
        return Response(await asyncio.to_thread(answer_bytes, answer), media_type=MEDIA_TYPE)

    def read(body: bytes) -> WireRequest:
        try:
            asked = read_request(body)
            require_answerable(asked, backend.info, backend.spec)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        targets = int((asked.lengths - asked.starts).sum())
        size = targets * bytes_per_target(
            backend.info,
            want=asked.want,
            hidden_dtype=asked.hidden_dtype,
            support=asked.support_width(),
            vocab_size=asked.vocab_size,
        )
        if size > config.max_response_bytes:
            raise Refusal(
                413,
                f"the answer about {targets} tokens would be {size} bytes, at most "
                f"{config.max_response_bytes} are sent; ask about fewer tokens or for a top_k",
            )
        return asked

    return app
