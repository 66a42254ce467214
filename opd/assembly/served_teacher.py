"""Teachers behind HTTP: the clients of one teacher's servers or of a pool, and when the servers sleep."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from opd.config.teacher import (
    PoolTeacherConfig,
    ServedTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
)
from opd.interfaces import Progress, Teacher
from opd.teacher.connect import (
    TEACHER_URLS,
    listed_urls,
    member_urls,
    server_client,
    sleep_switch,
)
from opd.teacher.pool import BalancedTeacher, RoutedTeacher
from opd.teacher.sleeping import SleepingTeacher
from opd.teacher.vocabulary import Vocabulary
from opd.types import ScoreRequest
from opd.world import World


def served_clients(
    config: ServedTeacherConfig,
    student: Vocabulary,
    requests: Sequence[ScoreRequest],
    progress: Progress,
) -> list[Teacher]:
    """One teacher or pool behind as many clients as there are requests."""
    if isinstance(config, PoolTeacherConfig):
        return _pools(config, student, requests, progress)
    urls = server_urls(config)
    return [_balanced(config, urls, student, each, progress) for each in requests]


def put_to_sleep(
    config: TeacherConfig,
    teachers: Sequence[Teacher],
    keep_head: Callable[[str | None], object],
    world: World,
) -> list[Teacher]:
    """``teachers``, whose servers sleep from here on while nobody scores, if that is set; collective.

    ``ValueError`` when a running server was not started with sleep=true.
    """
    if not (isinstance(config, ServedTeacherConfig) and config.sleep):
        return list(teachers)
    switch = sleep_switch(config, server_urls(config))
    if world.is_main:
        switch.sleep()
    world.barrier()
    return [SleepingTeacher(t, switch, world=world, keep_head=keep_head) for t in teachers]


def server_urls(config: ServedTeacherConfig) -> list[str]:
    """The addresses of all servers of a teacher or a pool, each once.

    ``ValueError`` for a model whose servers have not been started.
    """
    match config:
        case ServerTeacherConfig():
            return list(_own_urls(config))
        case PoolTeacherConfig(members=members):
            started = _started_servers()
            urls = [u for name, member in members.items() for u in _servers(name, member, started)]
            return list(dict.fromkeys(urls))
    raise AssertionError(f"{type(config).__name__} has no servers")


def _pools(
    config: PoolTeacherConfig,
    student: Vocabulary,
    requests: Sequence[ScoreRequest],
    progress: Progress,
) -> list[Teacher]:
    """One pool behind as many clients as there are requests.

    All members score over the smallest vocabulary among them. ``ValueError`` when one does not fit, or
    when it is a model whose server has not been started.
    """
    started = _started_servers()
    servers = {name: _servers(name, member, started) for name, member in config.members.items()}
    distinct = tuple(dict.fromkeys(servers.values()))
    sizes = [_balanced(config, urls, student, ScoreRequest(), progress).info() for urls in distinct]
    common = min(student.matrix_size, *(info.vocab_size for info in sizes))
    student = replace(student, matrix_size=common)
    pools: list[Teacher] = []
    for request in requests:
        teachers = {urls: _balanced(config, urls, student, request, progress) for urls in distinct}
        members = {name: teachers[urls] for name, urls in servers.items()}
        pools.append(RoutedTeacher(members, progress=progress))
    return pools


def _started_servers() -> dict[str, list[str]]:
    """The servers that the launcher started, by model."""
    return json.loads(os.environ.get(TEACHER_URLS, "{}"))


def _own_urls(config: ServerTeacherConfig) -> tuple[str, ...]:
    if config.url is not None:
        return listed_urls(config.url)
    urls = tuple(_started_servers().get(str(config.model), ()))
    if not urls:
        raise ValueError(
            f"teacher.model={config.model} has no server, and only opd train starts servers: start one "
            "with `opd teacher` and give its address as teacher.url"
        )
    return urls


def _servers(name: str, member: str, started: Mapping[str, list[str]]) -> tuple[str, ...]:
    urls = member_urls(member) or tuple(started.get(member, ()))
    if not urls:
        raise ValueError(
            f"teacher.members.{name}={member} is a model, and only opd train starts servers: start one "
            "with `opd teacher` and give its address"
        )
    return urls


def _balanced(
    config: ServedTeacherConfig,
    urls: Sequence[str],
    student: Vocabulary,
    request: ScoreRequest,
    progress: Progress,
) -> Teacher:
    """A client of the servers of one teacher."""
    if len(urls) == 1:
        return server_client(config, urls[0], student, request, progress)
    return BalancedTeacher(
        [partial(server_client, config, url, student, request) for url in urls], progress=progress
    )
