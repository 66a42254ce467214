"""A rollout engine behind HTTP."""

import os
from collections.abc import Sequence

from opd.config.rollout import ServerRolloutConfig, engine_dtype
from opd.config.schema import Config
from opd.config.student import DType
from opd.interfaces import Progress
from opd.rollout.wire import TOKEN_VARIABLE, GenerateRequest, read_response, request_bytes
from opd.serving.app import MEDIA_TYPE
from opd.serving.client import ServiceClient, parsed
from opd.types import Prompt, Rollout, Sampling

ROLLOUT_URLS = "OPD_ROLLOUT_URLS"
"""Environment variable: addresses of the rollout servers that the launcher started, comma separated."""
REMEDY = "is it running? (start one with `opd rollout model=MODEL port=PORT`)"
NAME = "the rollout server"


class ServerRollouts:
    """Implements ``RolloutEngine``. The weight sync marks the version.

    A request to a server that holds other weights than those of the marked version is retried, like
    one without a response: a restarted server gets its weights in the meantime.
    ``ConnectionError`` when it still cannot be reached, or is still behind, at the last retry.
    """

    def __init__(self, service: ServiceClient, *, run: str, progress: Progress) -> None:
        self._service = service
        self._run = run
        self._version = 0
        self._progress = progress

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        if not prompts:
            return []
        request = GenerateRequest(
            prompts=list(prompts), sampling=sampling, run=self._run, version=self._version
        )
        with self._progress.track("rollout", len(prompts)) as advance:
            response = self._service.send(
                "POST", "/generate", request_bytes(request), {"Content-Type": MEDIA_TYPE}
            )
            rollouts = parsed(
                response,
                lambda r: read_response(r.content, prompts, sampling),
                f"{sampling.n} completions of each of {len(prompts)} prompts",
            )
            advance(len(prompts))
        return rollouts

    def mark(self, version: int) -> None:
        """Demand the weights after ``version`` optimizer steps of every server."""
        self._version = version


def server_connection(config: ServerRolloutConfig, url: str) -> ServiceClient:
    """A connection to one rollout server, with the run's token, time-out and retries."""
    return ServiceClient(
        url,
        name=NAME,
        remedy=REMEDY,
        token=os.environ.get(TOKEN_VARIABLE),
        timeout=config.timeout,
        retries=config.retries,
    )


def require_servers_fit(config: Config, stop_ids: list[int], max_length: int) -> None:
    """Check every server in ``rollout.urls``; ValueError when one is away or does not fit."""
    if isinstance(config.rollout, ServerRolloutConfig):
        for url in config.rollout.urls:
            server = server_connection(config.rollout, url)
            require_server_fits(server, engine_dtype(config), stop_ids, max_length, retries=1)


def require_server_fits(
    server: ServiceClient, dtype: DType, stop_ids: list[int], max_length: int, *, retries: int
) -> None:
    """ValueError when a server cannot be reached, or has another dtype, stop ids or a shorter context."""
    try:
        response = server.send("GET", "/info", retries=retries)
    except ConnectionError as error:
        raise ValueError(str(error)) from None
    fields = ("dtype", "stop_ids", "max_length")
    info = parsed(
        response,
        lambda r: {name: r.json()[name] for name in fields},
        "the description of a rollout server",
    )
    needed = {"dtype": dtype.value, "stop_ids": stop_ids}
    for name, value in needed.items():
        if info[name] != value:
            raise ValueError(
                f"the rollout server at {server.url} has {name} {info[name]}, this run needs "
                f"{value}: start it with the run's student.model and rollout.dtype"
            )
    if info["max_length"] < max_length:
        raise ValueError(
            f"prompt plus completion can reach {max_length} tokens, the rollout server at "
            f"{server.url} takes {info['max_length']}: start it with a larger max_model_len"
        )
