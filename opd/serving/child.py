"""Start a service as a child of this process, and end it."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd.serving.parent import parent_variable

POLL_S = 0.1
END_S = 15.0
TAIL_CHARACTERS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningService:
    """The address, bearer token and process id of a started service."""

    url: str
    token: str
    pid: int


@contextmanager
def running_service(
    name: str,
    arguments: Sequence[str],
    *,
    variable: str,
    log_path: Path,
    environment: Mapping[str, str],
    token: str | None = None,
    wait_s: float = 1800.0,
) -> Iterator[RunningService]:
    """``python <arguments>`` on a free loopback port, ended when the context ends.

    ``port_file`` and ``exit_with_parent`` are added to its arguments, and ``variable`` holds its token
    (a random one unless given). It writes to ``log_path`` and ends by itself if this process dies. Its
    temporary files lie in a folder that is removed after it: workers of vLLM that are killed leave some.
    ``RuntimeError`` with the end of that log when it is not ready after ``wait_s`` seconds.
    """
    token = token or secrets.token_urlsafe(32)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        log_path.open("wb") as output,
    ):
        port_file = Path(folder) / "port"
        process = subprocess.Popen(
            [sys.executable, *arguments, f"port_file={port_file}", "exit_with_parent=true"],
            env=os.environ
            | dict(environment)
            | {variable: token, "TMPDIR": folder}
            | parent_variable(),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )
        try:
            port = _wait_for_port(name, port_file, process, log_path, wait_s)
            yield RunningService(url=f"http://127.0.0.1:{port}", token=token, pid=process.pid)
        finally:
            _end(process)


def _wait_for_port(
    name: str, port_file: Path, process: subprocess.Popen[bytes], log_path: Path, wait_s: float
) -> int:
    started = time.monotonic()
    while not port_file.exists():
        late = time.monotonic() - started > wait_s
        if late or process.poll() is not None:
            why = f"was not ready after {wait_s:.0f} s" if late else "ended while starting"
            tail = log_path.read_text(errors="replace")[-TAIL_CHARACTERS:]
            raise RuntimeError(f"the {name} {why}; the end of {log_path}:\n{tail}")
        time.sleep(POLL_S)
    return int(port_file.read_text())


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
