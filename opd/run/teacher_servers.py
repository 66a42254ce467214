"""The teacher servers that a run starts and ends."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd.config.schema import Config
from opd.config.teacher import (
    PoolTeacherConfig,
    ServedTeacherConfig,
    ServerTeacherConfig,
    TeacherServerConfig,
)
from opd.run.commands import teacher_command, teacher_commands
from opd.run.environment import child_environment
from opd.run.placement import Placement
from opd.serving.child import RunningService, running_service, started_service
from opd.serving.supervised import ServiceSupervisor, supervised_service
from opd.teacher.connect import TEACHER_URLS, pool_models
from opd.teacher.wire import TOKEN_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedTeachers:
    """Their addresses: ``environment`` for the run's processes, ``settings`` for another run."""

    environment: dict[str, str]
    settings: list[str]
    supervisors: dict[str, list[ServiceSupervisor]]
    """By model."""


NO_SERVERS = StartedTeachers(environment={}, settings=[], supervisors={})


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
            with _servers(config, placement, log_paths) as (servers, token):
                urls = _urls(servers)
                yield _started(servers, token, [f"teacher.url='{','.join(urls[model])}'"])
        case PoolTeacherConfig(members=members, replicas=replicas) if pool_models(members):
            needed = [
                logs / f"teacher_{number}_{replica}.log"
                for number, _ in enumerate(pool_models(members))
                for replica in range(replicas)
            ]
            with _servers(config, placement, needed) as (servers, token):
                urls = _urls(servers)
                settings = [
                    f"teacher.members.{name}='{','.join(urls[model])}'"
                    for name, model in members.items()
                    if model in urls
                ]
                yield _started(servers, token, settings)
        case _:
            yield NO_SERVERS


def _urls(servers: Mapping[str, list[ServiceSupervisor]]) -> dict[str, list[str]]:
    return {model: [s.service.url for s in each] for model, each in servers.items()}


def _started(
    servers: dict[str, list[ServiceSupervisor]], token: str, settings: list[str]
) -> StartedTeachers:
    environment = {TEACHER_URLS: json.dumps(_urls(servers)), TOKEN_VARIABLE: token}
    return StartedTeachers(environment=environment, settings=settings, supervisors=servers)


@contextmanager
def _servers(
    config: Config, placement: Placement, log_paths: list[Path]
) -> Iterator[tuple[dict[str, list[ServiceSupervisor]], str]]:
    """Start the servers concurrently; the supervisors of each model's, and the token of all."""
    assert isinstance(config.teacher, ServedTeacherConfig)
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
    commands = teacher_commands(config, placement)
    starting = [
        supervised_service(
            started_service(
                "teacher server",
                command.arguments,
                variable=TOKEN_VARIABLE,
                token=token,
                log_path=log,
                environment=child_environment() | command.environment,
            ),
            "teacher server",
            restarts=config.teacher.restarts,
            silent_s=config.launch.deadlines.server,
            log=str(log),
        )
        for command, log in zip(commands, log_paths, strict=True)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            entering = [pool.submit(stack.enter_context, server) for server in starting]
        servers: dict[str, list[ServiceSupervisor]] = {}
        for server, future in zip(placement.teachers, entering, strict=True):
            servers.setdefault(server.model, []).append(future.result())
        yield servers, token
