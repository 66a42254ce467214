"""A teacher's application in this process, with the back end of ``stub_teacher``."""

from fastapi import FastAPI

from opd.config.teacher import TeacherServerConfig
from opd.teacher.app import teacher_app
from opd.teacher.work_queue import WorkQueue
from tests.support.stub_teacher import StubBackend


def stub_app(token: str | None = None, tokens_per_second: float = 1e9) -> FastAPI:
    """The application of a teacher server; ``token`` None admits every caller."""
    config = TeacherServerConfig(model="stub", max_response_bytes=1 << 20)
    work = WorkQueue(
        lambda: StubBackend(tokens_per_second),
        max_waiting_tokens=config.max_waiting_tokens,
        max_held_bytes=config.max_response_bytes,
        sleeps=False,
    )
    return teacher_app(work, config, token=token)
