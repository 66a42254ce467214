"""The teacher servers that a run starts and ends."""

import json
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig, ServerTeacherConfig, TeacherServerConfig
from opd.run.commands import ChildCommand, teacher_command, teacher_commands
from opd.run.environment import child_environment
from opd.run.placement import Placement
from opd.serving.child import RunningService, running_service
from opd.teacher.connect import TEACHER_URLS, pool_models
from opd.teacher.wire import TOKEN_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedTeachers:
    """Their addresses: ``environment`` for the run's processes, ``settings`` for another run."""

    environment: dict[str, str]
    settings: list[str]


NO_SERVERS = StartedTeachers(environment={}, settings=[])


@contextmanager
def running_teacher(
    config: TeacherServerConfig,
    *,
    log_path: Path,
    token: str | None = None,
    wait_s: float = 1800.0,
) -> Iterator[RunningService]:
    """A server on a free port with ``token`` (a random one unless given), ended with the context.

    It writes to ``log_path`` and ends by itself if this process dies. ``RuntimeError`` with the end of that
    log when it is not ready after ``wait_s`` seconds.
    """
    command = teacher_command(config, {})
    with _running(command, log_path=log_path, token=token, wait_s=wait_s) as running:
        yield running


@contextmanager
def _running(
    command: ChildCommand, *, log_path: Path, token: str | None, wait_s: float = 1800.0
) -> Iterator[RunningService]:
    with running_service(
        "teacher server",
        command.arguments,
        variable=TOKEN_VARIABLE,
        token=token,
        log_path=log_path,
        environment=child_environment() | command.environment,
        wait_s=wait_s,
    ) as running:
        yield running


@contextmanager
def started_teachers(config: Config, placement: Placement, logs: Path) -> Iterator[StartedTeachers]:
    """The servers of teachers without an address, ended when the context ends."""
    match config.teacher:
        case ServerTeacherConfig(url=None, model=str(model), replicas=replicas):
            names = (
                [f"teacher_{i}.log" for i in range(replicas)] if replicas > 1 else ["teacher.log"]
            )
            log_paths = [logs / name for name in names]
            with _servers(config, placement, log_paths) as (urls, token):
                yield _started(urls, token, [f"teacher.url='{','.join(urls[model])}'"])
        case PoolTeacherConfig(members=members, replicas=replicas) if pool_models(members):
            needed = [
                logs / f"teacher_{number}_{replica}.log"
                for number, _ in enumerate(pool_models(members))
                for replica in range(replicas)
            ]
            with _servers(config, placement, needed) as (urls, token):
                settings = [
                    f"teacher.members.{name}='{','.join(urls[model])}'"
                    for name, model in members.items()
                    if model in urls
                ]
                yield _started(urls, token, settings)
        case _:
            yield NO_SERVERS


def _started(urls: dict[str, list[str]], token: str, settings: list[str]) -> StartedTeachers:
    environment = {TEACHER_URLS: json.dumps(urls), TOKEN_VARIABLE: token}
    return StartedTeachers(environment=environment, settings=settings)


@contextmanager
def _servers(
    config: Config, placement: Placement, log_paths: list[Path]
) -> Iterator[tuple[dict[str, list[str]], str]]:
    """Start the servers concurrently; the addresses of each model, and the token of all."""
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
    commands = teacher_commands(config, placement)
    starting = [
        _running(command, log_path=log, token=token)
        for command, log in zip(commands, log_paths, strict=True)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            entering = [pool.submit(stack.enter_context, server) for server in starting]
        urls: dict[str, list[str]] = {}
        for server, future in zip(placement.teachers, entering, strict=True):
            urls.setdefault(server.model, []).append(future.result().url)
        yield urls, token
