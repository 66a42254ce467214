"""The server refuses bad requests, and client and launcher report its failures."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import httpx
import numpy as np
import pytest

from opd.config.arguments import as_arguments
from opd.config.student import DType
from opd.config.teacher import ServerTeacherConfig, TeacherBackend, TeacherServerConfig
from opd.run.teacher_servers import running_teacher
from opd.serving.app import MEDIA_TYPE
from opd.serving.child import RunningService
from opd.teacher.client import ServerTeacher
from opd.teacher.vocabulary import Vocabulary
from opd.teacher.wire import WireRequest, request_bytes
from opd.types import FinishReason, Prompt, Rollout, ScoreRequest

VOCAB = 97


def _config(model: Path, **changed) -> TeacherServerConfig:
    return TeacherServerConfig(
        model=str(model),
        backend=TeacherBackend.torch,
        dtype=DType.float32,
        max_request_bytes=8192,
        max_response_bytes=4000,
        **changed,
    )


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    log = tmp_path_factory.mktemp("log") / "teacher.log"
    with running_teacher(_config(checkpoint), log_path=log, wait_s=120) as running:
        yield running


@pytest.fixture
def rollout() -> Rollout:
    return Rollout(
        prompt=Prompt(uid="p", token_ids=_ids(1, 2, 3)),
        token_ids=_ids(4, 5),
        logps=np.zeros(2, np.float32),
        finish_reason=FinishReason.length,
        version=0,
    )


def _post(server: RunningService, body: bytes, **headers: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {server.token}", "Content-Type": MEDIA_TYPE} | headers
    return httpx.post(f"{server.url}/score", content=body, headers=headers, timeout=300)


def _client(
    url: str, student: Vocabulary, *, token: str | None = None, **settings
) -> ServerTeacher:
    config = ServerTeacherConfig(**settings)
    return ServerTeacher(url, config, request=ScoreRequest(), student=student, token=token)


def _request(**changed) -> bytes:
    plain = {
        "token_ids": np.array([1, 2, 3], np.int32),
        "lengths": np.array([3], np.int32),
        "starts": np.array([1], np.int32),
        "vocab_size": VOCAB,
    }
    return request_bytes(WireRequest(**plain | changed))


def _ids(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


MALFORMED = {
    "noise": (b"\x10\0\0\0\0\0\0\0" + b"x" * 40, "not safetensors"),
    "empty": (b"", "not safetensors"),
    "header": (b"\xff" * 64, "header"),
    "too long": (
        _request(token_ids=np.ones(300, np.int32), lengths=_ids(300)),
        "300 tokens.*at most 64",
    ),
    "alien id": (_request(token_ids=_ids(1, VOCAB, 3)), "ids from 1 to 97, allowed are 0 to 96"),
    "negative id": (_request(token_ids=_ids(1, -1, 3)), "ids from -1"),
    "named id": (_request(named_ids=np.full((2, 1), VOCAB, np.int32)), "named_ids"),
    "named rows": (_request(named_ids=np.zeros((5, 1), np.int32)), r"must be \[2, K\]"),
    "start": (_request(starts=_ids(0)), "start"),
    "lengths": (_request(lengths=_ids(2)), "add up"),
    "type": (_request(lengths=np.array([3], np.int64)), "int64, must be int32"),
    "temperature": (_request(temperature=0.0), "temperature"),
    "not a number": (_request(temperature=float("nan")), "temperature"),
    "top_k": (_request(top_k=VOCAB + 1), "top_k"),
    "vocabulary": (_request(vocab_size=VOCAB + 1), "vocab_size"),
    "format": (_request().replace(b"opd-teacher-1", b"opd-teacher-9"), "format"),
    "want": (_request().replace(b'"want":"logps"', b'"want":"loops"'), "want"),
}


@pytest.mark.parametrize("fault", MALFORMED)
def test_malformed_requests_are_refused_with_400_and_one_line(
    fault: str, server: RunningService
) -> None:
    body, reason = MALFORMED[fault]
    response = _post(server, body)
    assert response.status_code == 400, response.text
    assert re.search(reason, response.text), response.text
    assert len(response.text) < 300


def test_a_wrong_or_missing_token_is_refused_with_401(server: RunningService) -> None:
    for value in ("Bearer wrong", "", "Bearer \u00e9"):
        headers = {"Authorization": value.encode("latin-1")}
        for method, path in (("POST", "/score"), ("GET", "/info"), ("GET", "/head?start=0&stop=1")):
            assert httpx.request(method, server.url + path, headers=headers).status_code == 401
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_size_limits_and_content_type_are_kept(server: RunningService) -> None:
    assert _post(server, _request()).status_code == 200
    assert _post(server, _request(), **{"Content-Type": "text/plain"}).status_code == 415
    assert _post(server, b"\0" * 9000).status_code == 413
    response = _post(server, _request(token_ids=np.ones(60, np.int32), lengths=_ids(60), top_k=20))
    assert response.status_code == 413
    assert "at most 4000" in response.text
    key = {"Authorization": f"Bearer {server.token}"}
    assert httpx.get(f"{server.url}/head?start=0&stop=98", headers=key).status_code == 400
    assert httpx.get(f"{server.url}/head?start=0&stop=97", headers=key).status_code == 413
    assert httpx.get(f"{server.url}/head?start=90&stop=97", headers=key).status_code == 200


def test_a_token_is_demanded_beyond_loopback(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    command = as_arguments(_config(checkpoint, host="0.0.0.0"))
    ended = subprocess.run(
        [sys.executable, "-m", "opd.run.serve", "teacher", *command], capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert "OPD_TEACHER_TOKEN" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_client_retries_after_transient_failures(
    server: RunningService, student: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.serving.client.FIRST_BACKOFF_S", 0.01)
    statuses = [503, 500, 200]
    info = httpx.get(f"{server.url}/info", headers={"Authorization": f"Bearer {server.token}"})

    class Flaky(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(info.content if status == 200 else b"busy")

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    with HTTPServer(("127.0.0.1", 0), Flaky) as flaky:
        Thread(target=flaky.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{flaky.server_port}"
        teacher = _client(url, student, retries=2, timeout=10)
        assert teacher.info().vocab_size == VOCAB
        assert statuses == []
        statuses[:] = [500, 500]
        with pytest.raises(ConnectionError, match=r"failed 2 times.*HTTP 500: busy"):
            _client(url, student, retries=1, timeout=10)
        flaky.shutdown()


def test_a_killed_server_gives_a_clear_error(
    checkpoint: Path,
    tmp_path: Path,
    student: Vocabulary,
    rollout: Rollout,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opd.serving.client.FIRST_BACKOFF_S", 0.01)
    config = _config(checkpoint)
    with running_teacher(config, log_path=tmp_path / "log", wait_s=120) as running:
        served = _client(running.url, student, token=running.token, retries=2)
        assert len(served.score([rollout])) == 1
        os.kill(running.pid, signal.SIGKILL)
        with pytest.raises(ConnectionError, match=r"failed 3 times.*is it running"):
            served.score([rollout])


def test_a_server_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    config = _config(tmp_path / "nothing")
    with (
        pytest.raises(RuntimeError, match="ended while starting"),
        running_teacher(config, log_path=tmp_path / "log", wait_s=120),
    ):
        pass


def test_a_server_ends_when_the_process_that_started_it_dies(
    checkpoint: Path, tmp_path: Path
) -> None:
    port_file = tmp_path / "port"
    words = as_arguments(_config(checkpoint, port_file=str(port_file), exit_with_parent=True))
    starter = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys, time;"
            "p = subprocess.Popen([sys.executable, '-m', 'opd.run.serve', 'teacher', *sys.argv[1:]]);"
            "time.sleep(600)",
            *words,
        ]
    )
    deadline = time.monotonic() + 600
    while not port_file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    url = f"http://127.0.0.1:{port_file.read_text()}/health"
    assert httpx.get(url).text == "ok"
    starter.kill()
    starter.wait()
    while _is_up(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _is_up(url)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False
