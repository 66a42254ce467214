"""Which failures are retried, how often, and what the error says: against a small HTTP server."""

import gzip
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from safetensors.numpy import save

from opd.config.student import DType
from opd.config.teacher import ServerTeacherConfig
from opd.rollout.client import ServerRollouts, require_server_fits
from opd.serving.client import ServiceClient
from opd.teacher.client import ServerTeacher
from opd.teacher.vocabulary import Vocabulary
from opd.tracking.console import SilentProgress
from opd.types import FinishReason, Prompt, Rollout, Sampling, ScoreRequest

Answer = tuple[int, bytes | Iterator[bytes]] | tuple[int, bytes, dict[str, str]]
RETRIES = 8


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.serving.client.FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr("opd.serving.client.MAX_BACKOFF_S", 0.002)


@contextmanager
def answering(answers: Callable[[int], Answer]) -> Iterator[tuple[str, list[str]]]:
    """A server whose n-th response is ``answers(n)``; its address, and the requests that came."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            status, body, *headers = answers(len(requests) - 1)
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.end_headers()
            for part in [body] if isinstance(body, bytes) else body:
                self.wfile.write(part)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A client that has stopped waiting is no error."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", requests
        server.shutdown()


def client(url: str, *, token: str | None = None, timeout: float = 10.0) -> ServiceClient:
    return ServiceClient(
        url, name="the service", remedy="start it", token=token, timeout=timeout, retries=RETRIES
    )


@pytest.mark.parametrize("status", [500, 501, 507, 599])
@pytest.mark.parametrize(
    "body",
    [
        lambda n: b"scoring failed: index out of range in self",
        lambda n: b"",
        lambda n: f"CUDA out of memory: tried 2.{n} GiB, {17 * n} MiB are free".encode(),
        lambda n: f"request 5e{n}c-00ab-{n}f at 0x7f{n}a: broken".encode(),
        lambda n: b"<html>\n<h1>Internal\n Server Error</h1></html>",
        lambda n: (b"out of memory", b"shape mismatch", b"failed on Monday")[n % 3],
    ],
    ids=["same", "empty", "sizes", "ids", "page", "words"],
)
def test_a_failure_that_comes_again_is_final_after_three_attempts(
    status: int, body: Callable[[int], bytes]
) -> None:
    with answering(lambda n: (status, body(n))) as (url, requests):
        with pytest.raises(ConnectionError) as raised:
            client(url).send("POST", "/score", b"x")
        assert len(requests) == 3
    message = str(raised.value)
    assert f"failed POST /score 3 times in the same way: HTTP {status}: " in message
    assert " ".join(body(2).decode().split()) in message
    assert "\n" not in message


@pytest.mark.parametrize("status", [408, 409, 502, 504])
def test_statuses_of_a_server_that_will_be_back_use_all_retries(status: int) -> None:
    with answering(lambda n: (status, b"later")) as (url, requests):
        with pytest.raises(ConnectionError, match=rf"failed 9 times.*{status}: later; start it"):
            client(url).send("GET", "/info")
        assert len(requests) == 1 + RETRIES


@pytest.mark.parametrize(
    "statuses",
    [
        [500, 500, 200],
        [503] * 8 + [200],
        [500, 503, 500, 500, 503, 500, 200],
        [502, 409, 504, 200],
        [429, 429, 429, 429, 200],
        [408, 408, 408, 200],
    ],
)
def test_a_server_that_recovers_in_time_is_not_given_up(statuses: list[int]) -> None:
    with answering(lambda n: (statuses[n], b"x")) as (url, requests):
        assert client(url).send("GET", "/info").content == b"x"
        assert len(requests) == len(statuses)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("retries", [0, RETRIES])
def test_a_busy_server_is_waited_for_until_the_timeout_and_spends_no_retry(
    status: int, retries: int
) -> None:
    busy = 5 * RETRIES
    with answering(lambda n: (status, b"later") if n < busy else (200, b"x")) as (url, requests):
        assert client(url, timeout=60).send("GET", "/info", retries=retries).content == b"x"
        assert len(requests) == busy + 1
    with answering(lambda n: (status, b"later")) as (url, requests):
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=rf"last with HTTP {status}: later; start it"):
            client(url, timeout=3).send("GET", "/info", retries=retries)
        assert 3 < time.monotonic() - started < 30
        assert len(requests) > RETRIES + 1


def test_failures_between_busy_responses_spend_the_retries() -> None:
    statuses = itertools.cycle([500, 503])
    with answering(lambda n: (next(statuses), b"broken")) as (url, requests):
        with pytest.raises(ConnectionError, match="failed 17 times"):
            client(url).send("GET", "/info")
        assert len(requests) == 2 * (1 + RETRIES) - 1


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_server_that_drips_is_given_up_after_three_timeouts(method: str) -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(600):
            time.sleep(0.1)
            yield b"x"

    with answering(lambda n: (200, drip())) as (url, requests):
        started = time.monotonic()
        with pytest.raises(ConnectionError, match=r"same way: no response in 1 s"):
            client(url, timeout=1).send(method, "/info", b"x" if method == "POST" else b"")
        assert time.monotonic() - started < 60, "one whole response takes so long"
        assert len(requests) == 3


@pytest.mark.parametrize("kind", ["bomb", "flood"])
def test_more_bytes_than_are_possible_are_refused_at_once(kind: str) -> None:
    bodies = {"bomb": gzip.compress(bytes(64 << 20)), "flood": bytes(1 << 20)}
    headers = {"Content-Encoding": "gzip"} if kind == "bomb" else {}
    with answering(lambda n: (200, bodies[kind], headers)) as (url, requests):
        with pytest.raises(ValueError, match="is refused: it is"):
            client(url).send("GET", "/info", max_bytes=1 << 16)
        assert len(requests) == 1


@pytest.mark.parametrize("pair", [(500, 501), (500, 502), (507, 408)])
def test_failures_of_different_kinds_use_all_retries(pair: tuple[int, int]) -> None:
    statuses = itertools.cycle(pair)
    with answering(lambda n: (next(statuses), b"broken")) as (url, requests):
        with pytest.raises(ConnectionError, match="failed 9 times"):
            client(url).send("GET", "/info")
        assert len(requests) == 1 + RETRIES


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 425])
def test_a_refusal_is_asked_once_and_shows_the_servers_words(status: int) -> None:
    with answering(lambda n: (status, b"top_k is\n too large")) as (url, requests):
        with pytest.raises(
            ValueError, match=rf"refused GET /info: HTTP {status}: top_k is too large"
        ):
            client(url).send("GET", "/info")
        assert len(requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_names_the_other_address(status: int) -> None:
    moved = {"Location": "https://elsewhere:1/info"}
    with answering(lambda n: (status, b"", moved)) as (url, requests):
        with pytest.raises(ValueError, match="moved to https://elsewhere:1/info; use that address"):
            client(url).send("GET", "/info")
        assert len(requests) == 1


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_server_that_never_responds_is_given_up_after_three_timeouts(method: str) -> None:
    ended = threading.Event()

    def hang(n: int) -> Answer:
        ended.wait(30)
        return 200, b""

    with answering(hang) as (url, requests):
        started = time.monotonic()
        with pytest.raises(
            ConnectionError, match=r"3 times in the same way: no response in 0\.25 s"
        ):
            client(url, timeout=0.25).send(method, "/info")
        ended.set()
        assert time.monotonic() - started < 10
        assert len(requests) == 3


def test_a_refused_connection_uses_all_retries() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=r"failed 9 times.*refused.*start it"):
            client(url).send("GET", "/info")


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "127.0.0.1:8000", "ftp://host:1", "http://", "http://h:port", "", "/x"],
)
def test_what_is_no_address_is_refused_before_any_request(url: str) -> None:
    with pytest.raises(ValueError, match=r"is no address of the service.*http://HOST:PORT"):
        client(url)


@pytest.mark.parametrize("token", ["secret\n", " secret", "sec ret", "sécret", "secret\r\n"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="bearer token for the service has a blank") as raised:
        client("http://127.0.0.1:1", token=token)
    assert token.strip() not in str(raised.value)


def test_https_to_a_server_without_a_certificate_is_refused_at_once() -> None:
    with answering(lambda n: (200, b"")) as (url, requests):
        with pytest.raises(ValueError, match=r"cannot be reached by https.*use http://"):
            client(url.replace("http://", "https://")).send("GET", "/info")
        assert requests == []


OTHERS = {
    "page": b"<html>hello</html>",
    "nothing": b"",
    "list": b"[1, 2]",
    "another service": b'{"object": "list", "data": []}',
    "null": b"null",
    "other tensors": save({"tail": np.zeros(3, np.float32)}),
}
INFO = b"""{"model": "m", "vocab_size": 10, "hidden_size": 4, "tokenizer_fingerprint": "x",
"tokenizer_size": 10, "max_length": 99}"""
PROMPT = Prompt(uid="p", token_ids=np.array([1, 2], np.int32))
ROLLOUT = Rollout(
    prompt=PROMPT,
    token_ids=np.array([3], np.int32),
    logps=np.zeros(1, np.float32),
    finish_reason=FinishReason.stop,
    version=0,
)


def teacher(url: str) -> ServerTeacher:
    return ServerTeacher(
        url,
        ServerTeacherConfig(),
        request=ScoreRequest(),
        student=Vocabulary(fingerprint="x", tokenizer_size=10, matrix_size=10),
    )


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_another_service_at_the_address_is_recognised(body: bytes) -> None:
    with answering(lambda n: (200, body)) as (url, _):
        with pytest.raises(ValueError, match="not the description of a rollout server"):
            require_server_fits(client(url), DType.float32, [1], 10, retries=0)
        with pytest.raises(ValueError, match="not the description of an opd teacher"):
            teacher(url)
        rollouts = ServerRollouts(client(url), run="r", progress=SilentProgress())
        with pytest.raises(ValueError, match="not 2 completions of each of 1 prompts"):
            rollouts.generate([PROMPT], Sampling(n=2))


@pytest.mark.parametrize("body", OTHERS.values(), ids=OTHERS)
def test_a_teachers_other_responses_are_recognised_too(body: bytes) -> None:
    with answering(lambda n: (200, INFO if n == 0 else body)) as (url, _):
        served = teacher(url)
        with pytest.raises(ValueError, match=r"/score returned .* not scores of an opd teacher"):
            served.score([ROLLOUT])
        with pytest.raises(ValueError, match=r"/head.* not rows of an output head"):
            served.head()


@pytest.mark.parametrize("statuses", [[503, 200], [500, 503, 200], [409, 409, 409, 200]])
def test_the_first_failure_of_a_request_is_logged_and_the_others_are_not(
    statuses: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with answering(lambda n: (statuses[n], b"busy")) as (url, _):
        client(url).send("GET", "/info")
    logged = [record.getMessage() for record in caplog.records if record.name == "opd.serving"]
    assert logged == [f"the service at {url}: HTTP {statuses[0]}: busy; trying again"]
