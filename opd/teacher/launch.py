"""Start a teacher server as a child of this process, and end it."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from opd.teacher.options import TOKEN_VARIABLE, TeacherServerOptions, arguments_of

POLL_S = 0.1
END_S = 15.0
TAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningTeacher:
    """Where a started server is and what opens it."""

    url: str
    token: str
    pid: int


@contextmanager
def running_teacher(
    options: TeacherServerOptions,
    *,
    log_path: Path,
    devices: str | None = None,
    wait_s: float = 1800.0,
) -> Iterator[RunningTeacher]:
    """A server on a free port with a fresh random token, ended when the context ends.

    ``devices`` becomes its CUDA_VISIBLE_DEVICES. It writes to ``log_path`` and ends by itself if
    this process dies. ``RuntimeError`` with the end of that log when it is not up in ``wait_s``.
    """
    token = secrets.token_urlsafe(32)
    visible = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
    with tempfile.TemporaryDirectory() as folder, log_path.open("wb") as output:
        port_file = Path(folder) / "port"
        told = replace(options, port_file=str(port_file), exit_with_parent=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "opd.teacher.server", *arguments_of(told)],
            env=os.environ | {TOKEN_VARIABLE: token} | visible,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            port = _wait_for(port_file, process, log_path, wait_s)
            yield RunningTeacher(url=f"http://{options.host}:{port}", token=token, pid=process.pid)
        finally:
            _end(process)


def _wait_for(port_file: Path, process: subprocess.Popen, log_path: Path, wait_s: float) -> int:
    started = time.monotonic()
    while not port_file.exists():
        late = time.monotonic() - started > wait_s
        if late or process.poll() is not None:
            why = f"was not ready after {wait_s:.0f} s" if late else "ended while starting"
            tail = log_path.read_text(errors="replace")[-TAIL_CHARACTERS:]
            raise RuntimeError(f"the teacher server {why}; the end of {log_path}:\n{tail}")
        time.sleep(POLL_S)
    return int(port_file.read_text())


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
