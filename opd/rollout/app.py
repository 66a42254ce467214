"""The endpoints of a rollout server: POST /generate, POST /weights, GET /info, GET /health."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from opd.interfaces import RolloutEngine
from opd.rollout.wire import TOKEN_VARIABLE, GenerateRequest, read_request, response_bytes
from opd.serving.app import MEDIA_TYPE, Refusal, bare_app, failure, read_body, require_token
from opd.serving.client import CONFLICT
from opd.serving.waiting import BoundedResponse
from opd.types import ReceiverState

log = logging.getLogger("opd.rollout")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The model that a server holds; a run refuses one that does not fit."""

    model: str
    dtype: str
    max_length: int
    vocab_size: int
    stop_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHost:
    """An engine, and how weights reach it: ``take`` a message, report the ``state``."""

    engine: RolloutEngine
    model: ServedModel
    take: Callable[[bytes], ReceiverState]
    state: Callable[[], ReceiverState]


def rollout_app(
    build: Callable[[], EngineHost], *, token: str | None, max_request_bytes: int
) -> FastAPI:
    """The application. One thread builds the engine and alone uses it, one request at a time.

    So prompts are batched as the caller grouped them, and samples do not depend on other callers.
    ``token`` None admits every caller who reaches the port.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
    host = thread.submit(build).result()
    app = bare_app("opd rollout")

    @app.get("/info")
    async def info(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        return JSONResponse(asdict(host.model) | {"receiver": asdict(host.state())})

    @app.post("/weights")
    async def weights(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        body = await read_body(request, max_request_bytes)
        try:
            state = await asyncio.wrap_future(thread.submit(host.take, body))
        except Exception as error:
            log.exception("weights could not be loaded")
            return failure("loading weights", error)
        return JSONResponse(asdict(state))

    @app.post("/generate")
    async def generate(request: Request) -> Response:
        require_token(request, token, TOKEN_VARIABLE)
        body = await read_body(request, max_request_bytes)
        try:
            generate_request = await asyncio.to_thread(read_request, body)
        except ValueError as error:
            raise Refusal(400, str(error)) from error
        _require_fit(generate_request, host.model)
        try:
            return await asyncio.wrap_future(thread.submit(_generate, host, generate_request))
        except Refusal:
            raise
        except Exception as error:
            log.exception("generating from %d prompts failed", len(generate_request.prompts))
            return failure("generating", error)

    return app


def _generate(host: EngineHost, request: GenerateRequest) -> Response:
    state = host.state()
    if (state.run, state.version) != (request.run, request.version):
        raise Refusal(
            CONFLICT,
            f"requested is version {request.version} of run {request.run}, here is version "
            f"{state.version} of run {state.run}",
        )
    rollouts = host.engine.generate(request.prompts, request.sampling)
    return BoundedResponse(response_bytes(rollouts), media_type=MEDIA_TYPE)


def _require_fit(request: GenerateRequest, model: ServedModel) -> None:
    """Refuse ids that the model does not have and completions longer than it takes."""
    longest = max(len(p.token_ids) for p in request.prompts) + request.sampling.max_tokens
    if longest > model.max_length:
        raise Refusal(
            400,
            f"prompt plus completion can reach {longest} tokens, this server takes "
            f"{model.max_length}; start it with a larger max_model_len",
        )
    for prompt in request.prompts:
        least, most = int(prompt.token_ids.min()), int(prompt.token_ids.max())
        if least < 0 or most >= model.vocab_size:
            wrong = least if least < 0 else most
            raise Refusal(
                400,
                f"prompt {prompt.uid} holds the id {wrong}, the vocabulary of {model.model} has ids from "
                f"0 to {model.vocab_size - 1}",
            )
    if request.sampling.support_k > model.vocab_size:
        raise Refusal(400, f"sampling.support_k is more than the {model.vocab_size} ids there are")
