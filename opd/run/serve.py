"""A teacher or rollout server as a process: ``python -m opd.run.serve teacher model=... port=...``."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fastapi import FastAPI

from opd.assembly.rollout_server import build_engine_host
from opd.assembly.teacher_server import build_backend
from opd.config.arguments import parse_arguments
from opd.config.rollout import RolloutServerConfig
from opd.config.teacher import TeacherServerConfig
from opd.rollout.app import rollout_app
from opd.rollout.wire import TOKEN_VARIABLE as ROLLOUT_TOKEN
from opd.run.revisions import pinned_model
from opd.serving.server import serve
from opd.teacher.app import teacher_app
from opd.teacher.wire import TOKEN_VARIABLE as TEACHER_TOKEN
from opd.teacher.work_queue import WorkQueue
from opd.timing import name_process


def serve_teacher(config: TeacherServerConfig) -> None:
    """Load the model and score until SIGTERM or SIGINT.

    ``ValueError`` when the address is taken, or not loopback and there is no token.
    """
    token = os.environ.get(TEACHER_TOKEN)
    config = replace(config, model=pinned_model(config.model))

    def application() -> FastAPI:
        work = WorkQueue(
            lambda: build_backend(config),
            max_waiting_tokens=config.max_waiting_tokens,
            max_held_bytes=config.max_response_bytes,
            sleeps=config.sleep,
        )
        return teacher_app(work, config, token=token)

    name_process(f"teacher {config.model}")
    serve(application, config, token=token, variable=TEACHER_TOKEN)


def serve_rollouts(config: RolloutServerConfig) -> None:
    """Start the engine and generate until SIGTERM or SIGINT.

    ``ValueError`` when the address is taken, or not loopback and there is no token.
    """
    token = os.environ.get(ROLLOUT_TOKEN)
    config = replace(config, model=pinned_model(config.model))

    def application() -> FastAPI:
        build = partial(build_engine_host, config)
        return rollout_app(build, token=token, max_request_bytes=config.max_request_bytes)

    name_process(f"rollout {config.model}")
    serve(application, config, token=token, variable=ROLLOUT_TOKEN)


def main(kind: str, words: Sequence[str]) -> None:
    """Serve a ``kind`` (teacher or rollout) with the settings in key=value ``words``."""
    match kind:
        case "teacher":
            serve_teacher(parse_arguments(TeacherServerConfig, words))
        case "rollout":
            serve_rollouts(parse_arguments(RolloutServerConfig, words))
        case _:
            raise ValueError(f"there is no server {kind}: allowed are teacher and rollout")


def show_log() -> None:
    """Write what the server says of itself, its address above all, to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


if __name__ == "__main__":
    show_log()
    try:
        main(sys.argv[1], sys.argv[2:])
    except ValueError as error:
        sys.exit(f"opd {sys.argv[1]}: {error}")
