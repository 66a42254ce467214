"""The endpoints of a rollout server: POST /generate, POST /weights, GET /info, GET /health."""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import NoReturn

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from opd.interfaces import RolloutEngine
from opd.rollout.wire import TOKEN_VARIABLE, GenerateRequest, read_request, response_bytes
from opd.serving.app import MEDIA_TYPE, Refusal, bare_app, failure, read_body, require_token
from opd.serving.client import CONFLICT
from opd.serving.waiting import BoundedResponse
from opd.timing import span
from opd.types import Prompt, ReceiverState, Sampling

log = logging.getLogger("opd.rollout")
PROBE = Prompt(uid="probe", token_ids=np.zeros(1, np.int32))


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


class EngineCheck:
    """Whether an engine still generates after an error; only its own thread may run the check.

    An engine of vLLM that has failed inside a step may answer nobody from then on, and it cannot be made
    anew in the same process: its process groups, and on CUDA its memory and a broken context, stay.
    """

    def __init__(self, host: EngineHost, leave: Callable[[str], object]) -> None:
        self._host, self._leave = host, leave
        self._fault: str | None = None

    def fault(self) -> str | None:
        """Why nobody is answered, while that is so."""
        return self._fault

    def run(self, error: Exception) -> None:
        """Complete a prompt of one token; leave when that fails."""
        self._fault = f"the engine is being checked after {type(error).__name__}"
        try:
            self._host.engine.generate([PROBE], Sampling(n=1, max_tokens=1, temperature=0.0))
        except Exception as again:  # an engine may fail in any way
            log.exception("the engine does not generate any more")
            words = " ".join(str(again).split())
            self._fault = (
                f"the engine of the rollout server failed and does not generate any more "
                f"({type(again).__name__}: {words}): start the server again"
            )
            self._leave(self._fault)
            return
        self._fault = None


def leave_process(sentence: str) -> NoReturn:
    """Write the sentence to stderr and end this process with status 1, whatever its threads do."""
    print(f"opd rollout: {sentence}", file=sys.stderr, flush=True)
    os._exit(1)


def rollout_app(
    build: Callable[[], EngineHost],
    *,
    token: str | None,
    max_request_bytes: int,
    leave: Callable[[str], object] = leave_process,
) -> FastAPI:
    """The application. One thread builds the engine and alone uses it, one request at a time.

    So prompts are batched as the caller grouped them, and samples do not depend on other callers.
    ``token`` None admits every caller who reaches the port. ``leave`` is called with a sentence when the
    engine cannot generate any more: whoever started the server starts it again, and the run that sends
    the weights brings it up to date.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
    host = thread.submit(build).result()
    check = EngineCheck(host, leave)
    app = bare_app("opd rollout", check.fault)

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
            thread.submit(check.run, error)
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
            thread.submit(check.run, error)
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
    with span("rollout", prompts=len(request.prompts)):
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
