"""The endpoints of a rollout server: POST /generate, POST /weights, GET /info, GET /health."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from opd.interfaces import RolloutEngine
from opd.rollout.wire import TOKEN_VARIABLE, GenerateRequest, answer_bytes, read_request
from opd.serving.app import MEDIA_TYPE, Refusal, bare_app, read_body, require_token
from opd.serving.client import CONFLICT
from opd.types import ReceiverState

log = logging.getLogger("opd.rollout")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """What a server tells of itself; a run refuses one that does not fit."""

    model: str
    dtype: str
    max_length: int
    stop_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """An engine, and the two endpoints through which weights reach it."""

    engine: RolloutEngine
    model: ServedModel
    take: Callable[[bytes], ReceiverState]
    state: Callable[[], ReceiverState]


def rollout_app(
    make: Callable[[], Hosted], *, token: str | None, max_request_bytes: int
) -> FastAPI:
    """The application. One thread makes the engine and alone uses it, a request at a time.

    So prompts are batched as the caller grouped them and what is drawn does not depend on who else
    asks. ``token`` None lets in everybody who reaches the port.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
    hosted = thread.submit(make).result()
    app = bare_app("opd rollout")

    @app.get("/info")
    async def info(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return JSONResponse(asdict(hosted.model) | {"held": asdict(hosted.state())})

    @app.post("/weights")
    async def weights(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        body = await read_body(request, max_request_bytes)
        try:
            held = await asyncio.wrap_future(thread.submit(hosted.take, body))
        except Exception as error:
            log.exception("weights could not be loaded")
            return PlainTextResponse(f"loading weights failed: {error}", status_code=500)
        return JSONResponse(asdict(held))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        body = await read_body(request, max_request_bytes)
        try:
            asked = await asyncio.to_thread(read_request, body)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        _require_room(asked, hosted.model)
        try:
            return await asyncio.wrap_future(thread.submit(_generated, hosted, asked))
        except Refusal:
            raise
        except Exception as error:
            log.exception("generating from %d prompts failed", len(asked.prompts))
            return PlainTextResponse(f"generating failed: {error}", status_code=500)

    return app


def _generated(hosted: Hosted, asked: GenerateRequest) -> Response:
    held = hosted.state()
    if (held.run, held.version) != (asked.run, asked.version):
        raise Refusal(
            CONFLICT,
            f"asked for version {asked.version} of run {asked.run}, here is version {held.version} "
            f"of run {held.run}",
        )
    rollouts = hosted.engine.generate(asked.prompts, asked.sampling)
    return Response(answer_bytes(rollouts), media_type=MEDIA_TYPE)


def _require_room(asked: GenerateRequest, model: ServedModel) -> None:
    longest = max(len(p.token_ids) for p in asked.prompts) + asked.sampling.max_tokens
    if longest > model.max_length:
        raise Refusal(
            400,
            f"prompt plus completion can reach {longest} tokens, this server takes "
            f"{model.max_length}; start it with a larger max_model_len",
        )
