"""Start a service as a child of this process, start it again, and end it."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from opd.faults import RunError
from opd.serving.parent import parent_variable
from opd.serving.server import LISTENER

POLL_S = 0.1
END_S = 15.0
TAIL_CHARACTERS = 2000
BACKLOG = 4096
"""Connections that wait while a service is started again."""


class RunningService:
    """A started service: its address, its bearer token, and its process.

    This process holds the socket that the service listens on, until ``release`` or ``close``. So long the
    address stays, and connections made while there is no service wait for the next one.
    """

    def __init__(
        self,
        spawn: Callable[[], subprocess.Popen[bytes]],
        wait_until_ready: Callable[[subprocess.Popen[bytes]], None],
        *,
        listener: socket.socket,
        token: str,
    ) -> None:
        self._spawn, self._wait_until_ready = spawn, wait_until_ready
        self._listener, self._is_closed = listener, False
        self._lock = threading.Lock()
        self.url, self.token = f"http://127.0.0.1:{listener.getsockname()[1]}", token
        self._process = spawn()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def status(self) -> int | None:
        """The exit status of the process; None while it runs."""
        return self._process.poll()

    def wait_until_ready(self) -> None:
        """``RunError`` with the end of the log when the service ends before it is ready."""
        self._wait_until_ready(self._process)

    def restart(self) -> None:
        """Kill the process and start another one; ``RunError`` as for ``wait_until_ready``.

        Does nothing once the service is closed.
        """
        with self._lock:
            if self._is_closed:
                return
            self._process.kill()
            self._process.wait()
            self._process = self._spawn()
        self.wait_until_ready()

    def release(self) -> None:
        """Leave the address to the process alone: once that has ended, connections are refused."""
        self._listener.close()

    def close(self) -> None:
        """End the process; connections are refused from here on. Idempotent."""
        with self._lock:
            self._is_closed = True
        self.release()
        _end(self._process)


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
    """``started_service`` that nobody starts again."""
    with started_service(
        name,
        arguments,
        variable=variable,
        log_path=log_path,
        environment=environment,
        token=token,
        wait_s=wait_s,
    ) as service:
        service.release()
        yield service


@contextmanager
def started_service(
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
    ``RunError`` with the end of that log when it is not ready after ``wait_s`` seconds.
    """
    token = token or secrets.token_urlsafe(32)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        log_path.open("wb") as output,
        socket.socket() as listener,
    ):
        listener.bind(("127.0.0.1", 0))
        listener.listen(BACKLOG)
        port_file = Path(folder) / "port"

        def spawn() -> subprocess.Popen[bytes]:
            port_file.unlink(missing_ok=True)
            return subprocess.Popen(
                [sys.executable, *arguments, f"port_file={port_file}", "exit_with_parent=true"],
                env=os.environ
                | dict(environment)
                | {variable: token, "TMPDIR": folder, LISTENER: str(listener.fileno())}
                | parent_variable(),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
            )

        def wait_until_ready(process: subprocess.Popen[bytes]) -> None:
            _wait_for_port(name, port_file, process, log_path, wait_s)

        service = RunningService(spawn, wait_until_ready, listener=listener, token=token)
        try:
            service.wait_until_ready()
            yield service
        finally:
            service.close()


def _wait_for_port(
    name: str, port_file: Path, process: subprocess.Popen[bytes], log_path: Path, wait_s: float
) -> None:
    started = time.monotonic()
    while not port_file.exists():
        late = time.monotonic() - started > wait_s
        if late or process.poll() is not None:
            why = f"was not ready after {wait_s:.0f} s" if late else "ended while starting"
            tail = log_path.read_text(errors="replace")[-TAIL_CHARACTERS:]
            raise RunError(f"the {name} {why}; the end of {log_path}:\n{tail}")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
