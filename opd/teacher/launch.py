"""Start a teacher server as a child of this process, and end it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.serving.child import RunningService, running_service
from opd.serving.options import arguments_of
from opd.teacher.options import TOKEN_VARIABLE, TeacherServerOptions


@contextmanager
def running_teacher(
    options: TeacherServerOptions,
    *,
    log_path: Path,
    devices: str | None = None,
    token: str | None = None,
    wait_s: float = 1800.0,
) -> Iterator[RunningService]:
    """A server on a free port with ``token`` (a random one unless given), ended with the context.

    ``devices`` becomes its CUDA_VISIBLE_DEVICES. It writes to ``log_path`` and ends by itself if
    this process dies. ``RuntimeError`` with the end of that log when it is not up in ``wait_s``.
    """
    with running_service(
        "teacher server",
        ["-m", "opd.teacher.server", *arguments_of(options)],
        variable=TOKEN_VARIABLE,
        token=token,
        log_path=log_path,
        environment={} if devices is None else {"CUDA_VISIBLE_DEVICES": devices},
        wait_s=wait_s,
    ) as running:
        yield running
