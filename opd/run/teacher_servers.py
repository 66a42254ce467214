"""The teacher servers that a run brings along."""

import json
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd import build
from opd.config.schema import Config
from opd.config.models import PoolTeacherConfig, ServerTeacherConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedTeachers:
    """``environment`` tells the run's processes where they are; ``settings`` tell it to another run."""

    environment: dict[str, str]
    settings: list[str]


NOBODY = StartedTeachers(environment={}, settings=[])


@contextmanager
def started_teachers(config: Config, logs: Path) -> Iterator[StartedTeachers]:
    """The servers of the teachers for which no address is given, ended when the context ends."""
    match config.teacher:
        case ServerTeacherConfig(url=None, model=str(model)):
            with _servers(config.teacher, [(model, logs / "teacher.log")]) as (urls, token):
                url = urls[model][0]
                yield _told({build.TEACHER_URL: url}, token, [f"teacher.url={url}"])
        case PoolTeacherConfig(members=members, replicas=replicas) if build.pool_models(members):
            models = build.pool_models(members)
            wanted = [
                (model, logs / f"teacher_{number}_{replica}.log")
                for number, model in enumerate(models)
                for replica in range(replicas)
            ]
            with _servers(config.teacher, wanted) as (urls, token):
                settings = [
                    f"teacher.members.{name}='{','.join(urls[model])}'"
                    for name, model in members.items()
                    if model in urls
                ]
                yield _told({build.TEACHER_URLS: json.dumps(urls)}, token, settings)
        case _:
            yield NOBODY


def _told(environment: dict[str, str], token: str, settings: list[str]) -> StartedTeachers:
    from opd.teacher.options import TOKEN_VARIABLE

    return StartedTeachers(environment=environment | {TOKEN_VARIABLE: token}, settings=settings)


@contextmanager
def _servers(
    config: ServerTeacherConfig | PoolTeacherConfig, wanted: list[tuple[str, Path]]
) -> Iterator[tuple[dict[str, list[str]], str]]:
    """Start them all at once; the addresses of each model, and the token that opens all of them.

    ``wanted`` names the model and the log of each. A pool's servers share teacher.devices out, as
    many as each needs.
    """
    from opd.teacher.launch import running_teacher
    from opd.teacher.options import TOKEN_VARIABLE

    token = os.environ.get(TOKEN_VARIABLE) or secrets.token_urlsafe(32)
    starting = [
        running_teacher(
            build.teacher_options(config, model),
            log_path=log,
            devices=_devices(config, place),
            token=token,
        )
        for place, (model, log) in enumerate(wanted)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            entering = [pool.submit(stack.enter_context, server) for server in starting]
        urls: dict[str, list[str]] = {}
        for (model, _), future in zip(wanted, entering, strict=True):
            urls.setdefault(model, []).append(future.result().url)
        yield urls, token


def _devices(config: ServerTeacherConfig | PoolTeacherConfig, place: int) -> str | None:
    if config.devices is None or isinstance(config, ServerTeacherConfig):
        return config.devices
    devices, width = config.devices.split(","), config.tensor_parallel
    first = place * width % len(devices)
    return ",".join((devices + devices)[first : first + width])
