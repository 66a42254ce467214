"""Who scores."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from opd.assembly.numbers import torch_dtype
from opd.config.models import DType, LocalTeacherConfig, PoolTeacherConfig, ServedTeacherConfig, ServerTeacherConfig, TeacherConfig
from opd.interfaces import Progress, Teacher
from opd.types import Sampling, TeacherInfo, ScoreRequest

if TYPE_CHECKING:
    from opd.teacher.client import ServerTeacher
    from opd.teacher.options import TeacherServerOptions
    from opd.teacher.vocabulary import Vocabulary
    from opd.world import World


TEACHER_URL = "OPD_TEACHER_URL"
"""Environment variable by which a launcher tells where the teacher that it started is."""


def build_teacher(
    config: TeacherConfig,
    student: "Vocabulary",
    wanted: Sequence[ScoreRequest],
    world: "World",
    progress: Progress,
) -> list[Teacher]:
    """One teacher behind as many clients as there are things to ask; ValueError if it does not fit."""
    match config:
        case ServerTeacherConfig():
            url = config.url or os.environ.get(TEACHER_URL)
            assert url is not None, "the launcher starts a teacher where no url is given"
            return [server_client(config, url, student, want, progress) for want in wanted]
        case PoolTeacherConfig():
            from opd.assembly.pool import pool_teachers

            return pool_teachers(config, student, wanted, progress)
        case LocalTeacherConfig():
            return _local_teachers(config, student, wanted, world, progress)
    raise AssertionError(f"no teacher for {type(config).__name__}")


def server_client(
    config: ServedTeacherConfig,
    url: str,
    student: "Vocabulary",
    wanted: ScoreRequest,
    progress: Progress | None = None,
) -> "ServerTeacher":
    """A client of one server, with the run's token and patience."""
    from opd.teacher.client import ServerTeacher
    from opd.teacher.options import TOKEN_VARIABLE

    return ServerTeacher(
        url,
        wanted=wanted,
        student=student,
        token=os.environ.get(TOKEN_VARIABLE),
        timeout=config.timeout,
        retries=config.retries,
        hidden_dtype=config.hidden_dtype,
        progress=progress,
    )


def transport_words(
    config: TeacherConfig,
    infos: Sequence[TeacherInfo],
    student: "Vocabulary",
    wanted: ScoreRequest,
    sampling: Sampling,
) -> str:
    """How the answers of these teachers travel and what that costs, a line for each way."""
    from opd.teacher.transport import arithmetic
    from opd.teacher.vocabulary import common_vocab_size

    lines = [
        arithmetic(
            info,
            wanted,
            vocab_size=common_vocab_size(student.matrix_size, info),
            hidden_dtype=config.hidden_dtype,
            named=sampling.support_k,
        )
        for info in infos
    ]
    return "\n".join(dict.fromkeys(lines))


def _local_teachers(
    config: LocalTeacherConfig,
    student: "Vocabulary",
    wanted: Sequence[ScoreRequest],
    world: "World",
    progress: Progress,
) -> list[Teacher]:
    from opd.teacher.backend_torch import TorchBackend
    from opd.teacher.local import LocalTeacher

    assert config.model is not None
    backend = TorchBackend(
        config.model,
        dtype=config.dtype,
        device=str(world.device),
        batch_tokens=config.batch_tokens,
        max_length=config.max_length,
    )
    return [
        LocalTeacher(
            backend,
            wanted=want,
            student=student,
            batch_tokens=config.batch_tokens,
            hidden_dtype=config.hidden_dtype,
            progress=progress,
        )
        for want in wanted
    ]


def teacher_options(config: ServedTeacherConfig, model: str) -> "TeacherServerOptions":
    """How to start a server of ``model`` that a run brings along."""
    from opd.teacher.options import BackendName, TeacherServerOptions

    return TeacherServerOptions(
        model=model,
        backend=BackendName(config.backend),
        dtype=config.dtype,
        max_length=config.max_length,
        tensor_parallel_size=config.tensor_parallel,
        gpu_memory_fraction=config.gpu_memory_fraction,
    )


def teacher_infos(config: TeacherConfig, student: "Vocabulary") -> list[TeacherInfo]:
    """What each teacher is, before it is loaded; they stand in the order of ``teacher.members``.

    Raises ValueError when one cannot be reached or read, or when its vocabulary does not fit.
    """
    match config:
        case PoolTeacherConfig(members=members):
            return [
                info
                for name, member in members.items()
                for info in _member_infos(config, f"teacher.members.{name}", member, student)
            ]
        case ServerTeacherConfig(url=str(url)):
            return [_served_info(config, "teacher.url", url, student)]
    assert config.model is not None
    return [_read_info(config, "teacher.model", config.model, student)]


def _member_infos(
    config: PoolTeacherConfig, setting: str, member: str, student: "Vocabulary"
) -> list[TeacherInfo]:
    from opd.assembly.pool import urls_of

    urls = urls_of(member)
    if urls:
        return [_served_info(config, setting, url, student) for url in urls]
    return [_read_info(config, setting, member, student)]


def _served_info(
    config: ServedTeacherConfig, setting: str, url: str, student: "Vocabulary"
) -> TeacherInfo:
    brief = replace(config, timeout=10, retries=1)
    try:
        return server_client(brief, url, student, ScoreRequest()).info()
    except ConnectionError as error:
        raise ValueError(
            f"{setting}={url} cannot be reached ({error}): start one with "
            "`opd teacher --model MODEL`, or give a model"
        ) from None


def _read_info(
    config: TeacherConfig, setting: str, model: str, student: "Vocabulary"
) -> TeacherInfo:
    from opd.teacher.model_info import longest, read_info
    from opd.teacher.vocabulary import require_fit

    try:
        info = read_info(
            model,
            max_length=config.max_length or longest(model),
            dtype=None if config.dtype == DType.auto else torch_dtype(config.dtype),
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{setting}={model} cannot be read as a model folder or hub id ({first})"
        ) from None
    require_fit(info, student)
    return info
