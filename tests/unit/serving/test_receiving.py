"""How long a client waits for a response, and how much of it it takes."""

import gzip
from collections.abc import Callable, Iterator

import httpx
import pytest

from opd.serving.receiving import MAX_ERROR_BYTES, Oversized, Stalled, receive
from opd.serving.waiting import WAITED

HEADERS = {"content-type": WAITED}


class Clock:
    """Time that passes only when a chunk arrives."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def ticking(self, *chunks: bytes) -> Callable[[], Iterator[bytes]]:
        """A second goes by before each chunk."""

        def produce() -> Iterator[bytes]:
            for chunk in chunks:
                self.now += 1.0
                yield chunk

        return produce


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("opd.serving.receiving.time", clock)
    return clock


def received(
    chunks: Callable[[], Iterator[bytes]],
    *,
    headers: dict[str, str] = HEADERS,
    timeout: float = 5.0,
    max_bytes: int = 100,
    tokens: int = 10,
    status: int = 200,
) -> httpx.Response:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=headers, content=chunks())

    with (
        httpx.Client(transport=httpx.MockTransport(answer)) as client,
        client.stream("GET", "http://teacher/score") as stream,
    ):
        return receive(stream, timeout=timeout, max_bytes=max_bytes, tokens=tokens)


@pytest.mark.parametrize("cut", [1, 2, 7, 1000])
@pytest.mark.parametrize("status", [200, 204, 400, 500])
def test_lines_about_the_wait_are_taken_off_wherever_they_are_cut(cut: int, status: int) -> None:
    whole = b"ahead 900\nahead 20\nahead 0\nstatus %d 9\nstatus 7\n" % status
    chunks = [whole[start : start + cut] for start in range(0, len(whole), cut)]
    response = received(lambda: iter(chunks))
    assert (response.status_code, response.content) == (status, b"status 7\n")


def test_a_line_that_moves_is_waited_for_however_long_it_is(clock: Clock) -> None:
    lines = [b"ahead %d\n" % n for n in range(200, -1, -10)]
    response = received(clock.ticking(*lines, b"status 200 2\nok"), timeout=1.5)
    assert response.content == b"ok"
    assert clock.now > 120


@pytest.mark.parametrize(
    "lines",
    [
        [b"ahead 50\n"] * 400,
        [b"ahead %d\n" % n for n in range(1000, 600, -1)],
        [b"ahead %d\n" % n for n in range(400)],
        [b"ahead 0\n"] * 400,
        [b"ahead 1\n", b"ahead 0\n"] * 200,
    ],
    ids=["stands", "creeps", "grows", "at the front", "to and fro"],
)
def test_a_line_that_does_not_move_is_given_up(lines: list[bytes], clock: Clock) -> None:
    with pytest.raises(Stalled):
        received(clock.ticking(*lines), timeout=6, tokens=100)
    assert clock.now < 120


def test_the_most_that_is_waited_follows_the_work(clock: Clock) -> None:
    """A server that reports the least progress is given up after one timeout for each share."""
    lines = [b"ahead %d\n" % n for n in range(60, 0, -1)] + [b"ahead 0\n"] * 400
    with pytest.raises(Stalled):
        received(clock.ticking(*lines), timeout=11, tokens=10)
    assert 160 < clock.now < 180


@pytest.mark.parametrize("headers", [HEADERS, {}], ids=["after a wait", "at once"])
def test_a_dripping_body_is_given_up(headers: dict[str, str], clock: Clock) -> None:
    chunks = [b"status 200 400\n"] if headers else []
    chunks += [b"x"] * 400
    with pytest.raises(Stalled):
        received(clock.ticking(*chunks), headers=headers, timeout=6, max_bytes=1000)
    assert clock.now < 110


@pytest.mark.parametrize("headers", [HEADERS, {}], ids=["after a wait", "at once"])
def test_a_body_beyond_its_bound_is_not_read(headers: dict[str, str]) -> None:
    read: list[int] = []

    def endless() -> Iterator[bytes]:
        if headers:
            yield b"status 200 99999999\n"
        for number in range(1000):
            read.append(number)
            yield b"x" * 60

    with pytest.raises(Oversized, match="larger than the 100 bytes"):
        received(endless, headers=headers)
    assert len(read) == 2


def test_a_compressed_body_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(10 << 20))
    with pytest.raises(Oversized, match=r"compressed \(gzip\)"):
        received(lambda: iter([bomb]), headers={"content-encoding": "gzip"}, max_bytes=1 << 20)


def test_the_words_of_an_error_are_cut() -> None:
    response = received(lambda: iter([b"no " * 1000] * 1000), headers={}, max_bytes=10, status=500)
    assert response.status_code == 500
    assert 10 < len(response.content) <= MAX_ERROR_BYTES


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"ahead 5\n",
        b"ahead five\n",
        b"ahead -5\nstatus 200 0\n",
        b"status 200\n",
        b"hello",
        b"x" * 100,
        b"ahead " + b"1" * 100 + b"\n",
        b"status 200 5\nfour",
        b"status 200 2\nfour",
    ],
)
def test_a_response_that_is_not_whole_or_no_wait_is_a_failure_of_the_connection(
    body: bytes,
) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        received(lambda: iter([body]))
