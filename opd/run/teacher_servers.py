"""The teacher servers that a run starts and ends."""

import json
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from opd.config.arguments import as_arguments
from opd.config.schema import Config
from opd.config.teacher import (
    PoolTeacherConfig,
    ServedTeacherConfig,
    ServerTeacherConfig,
    TeacherEngineConfig,
    TeacherServerConfig,
)
from opd.run.environment import child_environment
from opd.serving.child import RunningService, running_service
from opd.teacher.connect import TEACHER_URLS, pool_models
from opd.teacher.wire import TOKEN_VARIABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedTeachers:
    """Their addresses: ``environment`` for the run's processes, ``settings`` for another run."""

    environment: dict[str, str]
    settings: list[str]


NO_SERVERS = StartedTeachers(environment={}, settings=[])


def server_config(config: ServedTeacherConfig, model: str) -> TeacherServerConfig:
    """The settings of a server of ``model`` that is started with a run."""
    shared = {f.name: getattr(config, f.name) for f in fields(TeacherEngineConfig)}
    return TeacherServerConfig(model=model, **shared)


@contextmanager
def running_teacher(
    config: TeacherServerConfig,
    *,
    log_path: Path,
    devices: str | None = None,
    token: str | None = None,
    wait_s: float = 1800.0,
) -> Iterator[RunningService]:
    """A server on a free port with ``token`` (a random one unless given), ended with the context.

    ``devices`` becomes its CUDA_VISIBLE_DEVICES. It writes to ``log_path`` and ends by itself if
    this process dies. ``RuntimeError`` with the end of that log when it is not ready after ``wait_s``
    seconds.
    """
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    with running_service(
        "teacher server",
        ["-m", "opd.run.serve", "teacher", *as_arguments(config)],
        variable=TOKEN_VARIABLE,
        token=token,
        log_path=log_path,
        environment=child_environment() | visible,
        wait_s=wait_s,
    ) as running:
        yield running


@contextmanager
def started_teachers(config: Config, logs: Path) -> Iterator[StartedTeachers]:
    """The servers of teachers without an address, ended when the context ends."""
    match config.teacher:
        case ServerTeacherConfig(url=None, model=str(model), replicas=replicas):
            names = (
                [f"teacher_{i}.log" for i in range(replicas)] if replicas > 1 else ["teacher.log"]
            )
            needed = [(model, logs / name) for name in names]
            with _servers(config.teacher, needed) as (urls, token):
                yield _started(urls, token, [f"teacher.url='{','.join(urls[model])}'"])
        case PoolTeacherConfig(members=members, replicas=replicas) if pool_models(members):
            models = pool_models(members)
            needed = [
                (model, logs / f"teacher_{number}_{replica}.log")
                for number, model in enumerate(models)
                for replica in range(replicas)
            ]
            with _servers(config.teacher, needed) as (urls, token):
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
    config: ServedTeacherConfig, needed: list[tuple[str, Path]]
) -> Iterator[tuple[dict[str, list[str]], str]]:
    """Start the servers concurrently; the addresses of each model, and the token of all.

    ``needed`` has the model and the log path of each. Several servers divide teacher.devices among
    themselves, ``tensor_parallel_size`` to each.
    """
    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
    starting = [
        running_teacher(
            server_config(config, model),
            log_path=log,
            devices=_devices(config, number, len(needed)),
            token=token,
        )
        for number, (model, log) in enumerate(needed)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            entering = [pool.submit(stack.enter_context, server) for server in starting]
        urls: dict[str, list[str]] = {}
        for (model, _), future in zip(needed, entering, strict=True):
            urls.setdefault(model, []).append(future.result().url)
        yield urls, token


def _devices(config: ServedTeacherConfig, number: int, servers: int) -> str | None:
    """The devices of server ``number``; one server alone has all of teacher.devices."""
    alone = servers == 1 and isinstance(config, ServerTeacherConfig)
    if config.devices is None or alone:
        return config.devices
    devices, width = config.devices.split(","), config.tensor_parallel_size
    first = number * width % len(devices)
    return ",".join((devices + devices)[first : first + width])
