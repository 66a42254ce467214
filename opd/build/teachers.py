"""Who scores."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from opd.config import (
    LocalTeacherConfig,
    ServerTeacherConfig,
    TeacherConfig,
)
from opd.interfaces import (
    Progress,
    Teacher,
)
from opd.types import TeacherInfo, Wanted

if TYPE_CHECKING:
    from opd.teacher.options import TeacherServerOptions
    from opd.teacher.vocabulary import Vocabulary
    from opd.world import World


TEACHER_URL = "OPD_TEACHER_URL"
"""Environment variable by which a launcher tells where the teacher that it started is."""


def build_teacher(
    config: TeacherConfig,
    student: "Vocabulary",
    wanted: Sequence[Wanted],
    world: "World",
    progress: Progress,
) -> list[Teacher]:
    """One teacher behind as many clients as there are things to ask; ValueError if it does not fit."""
    match config:
        case ServerTeacherConfig():
            from opd.teacher.client import ServerTeacher
            from opd.teacher.options import TOKEN_VARIABLE

            url = config.url or os.environ.get(TEACHER_URL)
            assert url is not None, "the launcher starts a teacher where no url is given"
            return [
                ServerTeacher(
                    url,
                    wanted=want,
                    student=student,
                    token=os.environ.get(TOKEN_VARIABLE),
                    timeout=config.timeout,
                    retries=config.retries,
                    progress=progress,
                )
                for want in wanted
            ]
        case LocalTeacherConfig():
            return _local_teachers(config, student, wanted, world, progress)
    raise AssertionError(f"no teacher for {type(config).__name__}")


def _local_teachers(
    config: LocalTeacherConfig,
    student: "Vocabulary",
    wanted: Sequence[Wanted],
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
            progress=progress,
        )
        for want in wanted
    ]


def teacher_options(config: ServerTeacherConfig) -> "TeacherServerOptions":
    """How to start the server that a run brings along."""
    from opd.teacher.options import BackendName, TeacherServerOptions

    assert config.model is not None
    return TeacherServerOptions(
        model=config.model,
        backend=BackendName(config.backend),
        dtype=config.dtype,
        max_length=config.max_length,
        tensor_parallel_size=config.tensor_parallel,
        gpu_memory_fraction=config.gpu_memory_fraction,
    )


def teacher_info(config: TeacherConfig, student: "Vocabulary") -> TeacherInfo:
    """What the teacher is, before it is loaded.

    Raises ValueError when it cannot be reached or read, or when its vocabulary does not fit.
    """
    from opd.teacher.checkpoint import longest, read_info
    from opd.teacher.client import ServerTeacher
    from opd.teacher.options import TOKEN_VARIABLE
    from opd.teacher.vocabulary import require_fit

    if isinstance(config, ServerTeacherConfig) and config.url is not None:
        token = os.environ.get(TOKEN_VARIABLE)
        try:
            return ServerTeacher(
                config.url, wanted=Wanted(), student=student, token=token, timeout=10, retries=1
            ).info()
        except ConnectionError as error:
            raise ValueError(
                f"teacher.url={config.url} cannot be reached ({error}): start one with "
                "`opd teacher --model MODEL`, or give teacher.model"
            ) from None
    assert config.model is not None
    try:
        info = read_info(config.model, max_length=config.max_length or longest(config.model))
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"teacher.model={config.model} cannot be read as a model folder or hub id ({first})"
        ) from None
    require_fit(info, student)
    return info
