"""The endpoints of a teacher server: /score, /info, /head, /sleep, /wake_up, /health."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial

import torch
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from safetensors.numpy import save

from opd.config.teacher import TeacherServerConfig
from opd.head import HeadSpec
from opd.serving.admission import AdmissionQueue
from opd.serving.app import (
    MEDIA_TYPE,
    Refusal,
    bare_app,
    failure,
    read_body,
    require_body,
    require_token,
)
from opd.serving.waiting import WaitingResponse
from opd.teacher.backend import Backend
from opd.teacher.response import require_answerable
from opd.teacher.scoring import copy_rows, folded_head, head_rows
from opd.teacher.transport import bytes_per_target
from opd.teacher.wire import (
    TOKEN_VARIABLE,
    WireRequest,
    read_request,
    response_bytes,
)
from opd.teacher.work_queue import ScoreJob, WorkQueue
from opd.types import TeacherInfo

HELD_REQUESTS = 16
"""Bodies of the largest size that are read ahead; what is beyond them waits at its client."""

log = logging.getLogger("opd.teacher")


def teacher_app(work: WorkQueue, config: TeacherServerConfig, *, token: str | None) -> FastAPI:
    """The application; ``token`` None admits every caller who reaches the port."""
    backend = work.backend()
    app = bare_app("opd teacher")
    line = AdmissionQueue(HELD_REQUESTS * config.max_request_bytes)

    @app.get("/info")
    async def info(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return JSONResponse(asdict(backend.info))

    def admit(request: Request) -> None:
        require_token(request, token, TOKEN_VARIABLE)

    @app.get("/head", dependencies=[Depends(admit)])  # checked before the parameters
    async def head(start: int, stop: int, bfloat16: bool = False) -> Response:
        _require_rows(backend.info, start, stop, config.max_response_bytes)
        spec = replace(backend.spec, vocab_size=stop - start)

        async def answer(_: bytes, closing: ExitStack) -> Response:
            copying = work.call(lambda backend: copy_rows(backend.head_VD, start, stop))
            rows_VD = await asyncio.wrap_future(copying)
            return await asyncio.to_thread(_head_response, rows_VD, spec, bfloat16)

        return _without_body(line, answer)

    @app.post("/score")
    async def score(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        closing = ExitStack()
        place = line.join(require_body(request, config.max_request_bytes))
        closing.callback(line.leave, place)

        async def read() -> bytes:
            await line.wait_until_admitted(place)
            return await read_body(request, config.max_request_bytes)

        async def answer(body: bytes, closing: ExitStack) -> Response:
            limit = config.max_response_bytes
            wire_request, size = await asyncio.to_thread(_require_request, body, backend, limit)
            place.tokens = len(wire_request.token_ids)
            job = work.submit(wire_request, size)
            closing.callback(work.release, job)
            response = await _scored(job)
            place.tokens = 0  # what is only to be sent is not ahead of anybody
            return response

        return WaitingResponse(read, answer, ahead=line.follow(place), closing=closing)

    @app.post("/sleep")
    async def sleep(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return _without_body(line, partial(_switch, work, work.sleep))

    @app.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return _without_body(line, partial(_switch, work, work.wake))

    return app


async def _scored(job: ScoreJob) -> Response:
    try:
        scores = await asyncio.wrap_future(job.done)
    except Exception as error:
        log.exception("scoring %d sequences failed", len(job.request.lengths))
        return failure("scoring", error)
    return Response(await asyncio.to_thread(response_bytes, scores), media_type=MEDIA_TYPE)


def _without_body(
    line: AdmissionQueue, answer: Callable[[bytes, ExitStack], Awaitable[Response]]
) -> Response:
    """The response to a request that waits for its turn like all others, and has no body."""

    async def read() -> bytes:
        return b""

    closing, place = ExitStack(), line.join(0)
    closing.callback(line.leave, place)
    return WaitingResponse(read, answer, ahead=line.follow(place), closing=closing)


async def _switch(
    work: WorkQueue, switch: Callable[[], Future[None]], _: bytes, closing: ExitStack
) -> Response:
    """Do /sleep or /wake_up, which may be sent twice."""
    if not work.sleeps:
        raise Refusal(400, "this server does not sleep: start it with sleep=true")
    try:
        await asyncio.wrap_future(switch())
    except Exception as error:
        log.exception("the teacher could not fall asleep or wake")
        return failure("sleeping or waking", error)
    return Response(status_code=204)


def _require_rows(info: TeacherInfo, start: int, stop: int, max_response_bytes: int) -> None:
    """Refusal when the head has no rows ``start`` to ``stop``, or they are too many for a response."""
    if not 0 <= start < stop <= info.vocab_size:
        raise Refusal(400, f"rows {start} to {stop} are not in 0 to {info.vocab_size}")
    if 4 * (stop - start) * info.hidden_size > max_response_bytes:
        raise Refusal(413, f"{stop - start} rows are more than {max_response_bytes} bytes")


def _head_response(rows_VD: torch.Tensor, spec: HeadSpec, bfloat16: bool) -> Response:
    """Rows of the output head, the model's logit scale included; in bfloat16 where that is exact."""
    rows_VD = folded_head(rows_VD, spec)
    return Response(save({"head": head_rows(rows_VD, bfloat16=bfloat16)}), media_type=MEDIA_TYPE)


def _require_request(
    body: bytes, backend: Backend, max_response_bytes: int
) -> tuple[WireRequest, int]:
    """The request in ``body`` and the size of its response; Refusal for a malformed or too large one."""
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
    return request, size
