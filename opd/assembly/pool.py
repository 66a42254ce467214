"""Several teachers: which servers each name has, and the clients of them."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from opd.assembly.teacher import server_client
from opd.config.models import PoolTeacherConfig
from opd.interfaces import Progress, Teacher
from opd.types import ScoreRequest

if TYPE_CHECKING:
    from opd.teacher.vocabulary import Vocabulary

TEACHER_URLS = "OPD_TEACHER_URLS"
"""Environment variable by which a launcher tells which servers it started: JSON, model -> urls."""


def urls_of(member: str) -> tuple[str, ...]:
    """The addresses that a member of a pool lists; none when it is a model."""
    listed = tuple(part.strip() for part in member.split(",") if part.strip())
    return listed if listed and all(u.startswith(("http://", "https://")) for u in listed) else ()


def pool_models(members: Mapping[str, str]) -> list[str]:
    """The models of a pool that need servers, each once."""
    return list(dict.fromkeys(m for m in members.values() if not urls_of(m)))


def pool_teachers(
    config: PoolTeacherConfig, student: "Vocabulary", wanted: Sequence[ScoreRequest], progress: Progress
) -> list[Teacher]:
    """One pool behind as many clients as there are things to ask.

    All members speak of the smallest vocabulary among them. ``ValueError`` when one does not fit, or
    when it is a model and nobody has started its server.
    """
    from opd.teacher.pool import RoutedTeacher

    started = json.loads(os.environ.get(TEACHER_URLS, "{}"))
    servers = {name: _servers(name, member, started) for name, member in config.members.items()}
    distinct = tuple(dict.fromkeys(servers.values()))
    sizes = [_teacher(config, urls, student, ScoreRequest(), progress).info() for urls in distinct]
    common = min(student.matrix_size, *(info.vocab_size for info in sizes))
    student = replace(student, matrix_size=common)
    pools: list[Teacher] = []
    for want in wanted:
        teachers = {urls: _teacher(config, urls, student, want, progress) for urls in distinct}
        members = {name: teachers[urls] for name, urls in servers.items()}
        pools.append(RoutedTeacher(members, progress=progress))
    return pools


def _servers(name: str, member: str, started: Mapping[str, list[str]]) -> tuple[str, ...]:
    urls = urls_of(member) or tuple(started.get(member, ()))
    if not urls:
        raise ValueError(
            f"teacher.members.{name}={member} is a model, and another launcher than opd train starts "
            "no servers: start one with `opd teacher` and give its address"
        )
    return urls


def _teacher(
    config: PoolTeacherConfig,
    urls: Sequence[str],
    student: "Vocabulary",
    wanted: ScoreRequest,
    progress: Progress,
) -> Teacher:
    from opd.teacher.pool import BalancedTeacher

    if len(urls) == 1:
        return server_client(config, urls[0], student, wanted, progress)
    return BalancedTeacher(
        [partial(server_client, config, url, student, wanted) for url in urls], progress=progress
    )
