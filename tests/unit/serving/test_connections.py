"""What a server does with connections that are silent, slow, without a token, or announce too much."""

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from opd.serving.app import MEDIA_TYPE
from opd.serving.child import RunningService
from opd.serving.connections import CROWDED_S, SILENT_S
from tests.support.stub_teacher import MAX_CONNECTIONS, TOKEN, running_stub

SOON_S = 60.0
"""On a busy machine."""
AUTHORISED = f"Authorization: Bearer {TOKEN}\r\nContent-Type: {MEDIA_TYPE}\r\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_stub(1e6, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def connection(server: RunningService) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), timeout=SOON_S)


def response_to(server: RunningService, request: str) -> str:
    """What comes for a request whose body is never sent."""
    with connection(server) as link:
        link.sendall(request.encode())
        return link.recv(1000).decode()


@pytest.mark.parametrize("length", ["1000000000000", "67108865", "nine", "-1"])
def test_an_announced_body_that_is_too_large_is_refused_before_it_is_sent(
    server: RunningService, length: str
) -> None:
    head = f"POST /score HTTP/1.1\r\nHost: x\r\n{AUTHORISED}Content-Length: {length}\r\n\r\n"
    assert response_to(server, head).split()[1] in ("413", "400")


def test_a_caller_without_the_token_is_refused_before_its_body_is_sent(
    server: RunningService,
) -> None:
    for path in ("/score", "/sleep", "/wake_up"):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
        assert response_to(server, head).split()[1] == "401"


@pytest.mark.parametrize("text", ["", "POST /score HTTP/1.1\r\nHost: x\r\n"])
def test_a_connection_without_a_whole_request_is_closed(server: RunningService, text: str) -> None:
    started = time.monotonic()
    with connection(server) as link:
        link.sendall(text.encode())
        for number in range(200):
            if text:
                link.sendall(f"X-{number}: y\r\n".encode())
            time.sleep(0.25)
            if _is_closed(link):
                break
    assert SILENT_S - 1 < time.monotonic() - started < SILENT_S + SOON_S / 2


def _is_closed(link: socket.socket) -> bool:
    link.setblocking(False)
    try:
        return link.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    finally:
        link.settimeout(SOON_S)


def test_silent_connections_make_room_when_there_is_none_left(server: RunningService) -> None:
    with ExitStack() as stack:
        for _ in range(2 * MAX_CONNECTIONS):
            stack.enter_context(connection(server))
        started = time.monotonic()
        assert httpx.get(f"{server.url}/health", timeout=SOON_S).text == "ok"
        assert time.monotonic() - started < 2 * CROWDED_S + SILENT_S / 2
