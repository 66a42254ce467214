"""A service that dies or does not answer is started again on its socket, and given up in one sentence."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import pytest

from opd.serving.child import started_service
from opd.serving.supervised import ServiceSupervisor, supervised_service

SERVICE = """
import os, socket, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
words = dict(word.split("=") for word in sys.argv[1:])
if os.path.exists("{broken}"):
    sys.exit("no model")
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(os.getpid()).encode())
server = HTTPServer(("127.0.0.1", 0), Answer, bind_and_activate=False)
server.socket = socket.socket(fileno=int(os.environ["OPD_LISTENER"]))
open(words["port_file"], "w").write("1")
server.serve_forever()
"""


def supervised(
    folder: Path, *, restarts: int, silent_s: float = 0
) -> AbstractContextManager[ServiceSupervisor]:
    starting = started_service(
        "teacher server",
        ["-c", SERVICE.format(broken=folder / "broken")],
        variable="OPD_TEST_TOKEN",
        log_path=folder / "log",
        environment={},
        wait_s=120,
    )
    return supervised_service(
        starting, "teacher server", restarts=restarts, silent_s=silent_s, log="its log"
    )


def answer(supervisor: ServiceSupervisor) -> int:
    return int(httpx.get(supervisor.service.url, timeout=120).text)


def wait_until(true: Callable[[], bool]) -> None:
    while not true():
        time.sleep(0.05)


def test_a_request_made_while_there_is_no_service_waits_for_the_next_one(tmp_path: Path) -> None:
    with supervised(tmp_path, restarts=1) as supervisor:
        first = answer(supervisor)
        assert first == supervisor.service.pid
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: supervisor.service.status() is not None)
        second = answer(supervisor)
        assert second != first
        os.kill(second, signal.SIGKILL)
        wait_until(lambda: bool(supervisor.failure))
        assert supervisor.failure == (
            "the teacher server was ended by signal 9, after 1 restarts; see its log"
        )
        with pytest.raises(httpx.ConnectError):
            answer(supervisor)


def test_a_stopped_service_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("opd.serving.supervised.ANSWER_S", 1.0)
    with supervised(tmp_path, restarts=1, silent_s=4) as supervisor:
        first = answer(supervisor)
        os.kill(first, signal.SIGSTOP)
        assert answer(supervisor) != first
    assert "gave no sign of life for 4 s: it is started again (1 of 1" in capfd.readouterr().err


def test_a_service_that_cannot_start_again_is_given_up(tmp_path: Path) -> None:
    with supervised(tmp_path, restarts=2) as supervisor:
        (tmp_path / "broken").touch()
        os.kill(answer(supervisor), signal.SIGKILL)
        wait_until(lambda: bool(supervisor.failure))
        assert supervisor.failure == (
            "the teacher server ended before it was ready, after 2 restarts; see its log"
        )


def test_a_service_is_not_started_again_while_its_run_ends(tmp_path: Path) -> None:
    with supervised(tmp_path, restarts=5) as supervisor:
        pid = answer(supervisor)
        os.kill(pid, signal.SIGTERM)
    time.sleep(2)
    assert supervisor.service.status() == -signal.SIGTERM
    assert supervisor.service.pid == pid
