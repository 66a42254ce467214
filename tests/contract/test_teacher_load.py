"""Many ranks at one teacher: a real HTTP server and real clients, a back end that sleeps per token."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

import httpx
import pytest

from opd.config.teacher import ServerTeacherConfig
from opd.serving.app import MEDIA_TYPE
from opd.serving.child import RunningService
from opd.teacher.client import ServerTeacher
from opd.teacher.local import LocalTeacher
from opd.teacher.wire import Want, request_bytes, wire_request_from
from opd.types import ScoredRollout, ScoreRequest
from tests.support.stub_teacher import STUDENT, TOKEN, VOCAB, StubBackend, numbered, running_stub

RANKS, IN_FLIGHT = 64, 4
SILENT = 300
TIMEOUT = 5.0
MOST_MIB = 64
"""What may be held of requests and responses, and copies; all responses are 62 MiB, or 1.2 GiB if long."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """``requests`` of ``length`` tokens from each rank, at a server of ``rate`` tokens a second."""

    requests: int
    length: int
    rate: float

    @property
    def numbers(self) -> range:
        return range(RANKS * self.requests)

    @property
    def cut(self) -> range:
        """The numbers of further requests whose clients leave: 5 %."""
        return range(len(self.numbers), len(self.numbers) + len(self.numbers) // 20)


SHORT = Load(requests=8, length=500, rate=20_000)
LONG = Load(requests=40, length=2000, rate=40_000)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the ranks got, what the server did, how long it took, and how its memory grew in MiB."""

    load: Load
    scored: list[list[ScoredRollout] | Exception]
    computed: dict[int, int]
    requests: int
    seconds: float
    growth: list[float]


@pytest.fixture(
    scope="module",
    params=[SHORT, pytest.param(LONG, marks=pytest.mark.slow)],
    ids=["short", "long"],
)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    load: Load = request.param
    with ExitStack() as stack:
        server = stack.enter_context(_stub(load.rate, tmp_path_factory.mktemp("log") / "log"))
        for _ in range(SILENT):
            stack.enter_context(_connection(server))
        with ThreadPoolExecutor(RANKS) as pool:
            ranks = list(pool.map(lambda _: _rank(server, load), range(RANKS)))
            before, growth = _mib(server), list[float]()
            started, ended = time.monotonic(), Event()
            watcher = Thread(target=_watch, args=(server, before, growth, ended))
            leavers = Thread(target=_leave, args=(server, load))
            watcher.start()
            leavers.start()
            shares = [load.numbers[rank::RANKS] for rank in range(RANKS)]
            scored = list(pool.map(_score, ranks, shares, [load.length] * RANKS))
            seconds = time.monotonic() - started
            ended.set()
            leavers.join()
            watcher.join()
        found = httpx.get(f"{server.url}/stub", timeout=60).json()
    return Outcome(
        load=load,
        scored=scored,
        computed={int(number): count for number, count in found["computed"].items()},
        requests=found["paths"]["/score"],
        seconds=seconds,
        growth=growth,
    )


def test_every_request_of_every_rank_is_answered(outcome: Outcome) -> None:
    assert [error for error in outcome.scored if isinstance(error, Exception)] == []
    local = LocalTeacher(StubBackend(1e9), request=ScoreRequest(full=True), student=STUDENT)
    for rank, scored in enumerate(outcome.scored):
        assert not isinstance(scored, Exception)
        uids = [int(each.rollout.prompt.uid) for each in scored]
        assert uids == list(outcome.load.numbers[rank::RANKS])
        if rank % 16:
            continue  # a few ranks show whether rows are those of their rollouts
        again = local.score([each.rollout for each in scored])
        for mine, theirs in zip(scored, again, strict=True):
            assert (mine.logps == theirs.logps).all()
            assert (mine.hidden == theirs.hidden).all()


def test_nothing_is_sent_or_computed_twice(outcome: Outcome) -> None:
    computed = [outcome.computed.get(number, 0) for number in outcome.load.numbers]
    assert computed == [1] * len(computed)
    assert outcome.requests == len(outcome.load.numbers) + len(outcome.load.cut)


def test_work_of_clients_that_left_is_not_done(outcome: Outcome) -> None:
    assert len(outcome.load.cut) > 20
    assert [number for number in outcome.load.cut if outcome.computed.get(number)] == []


def test_the_queue_costs_no_time(outcome: Outcome) -> None:
    load = outcome.load
    assert outcome.seconds < 1.3 * len(load.numbers) * load.length / load.rate


def test_a_load_leaves_no_memory_behind(outcome: Outcome) -> None:
    assert len(outcome.growth) > 5
    assert max(outcome.growth) < MOST_MIB


def _stub(rate: float, log: Path) -> AbstractContextManager[RunningService]:
    return running_stub(rate, log, max_waiting_tokens=4096, max_response_bytes=16 << 20)


def _rank(server: RunningService, load: Load) -> ServerTeacher:
    return ServerTeacher(
        server.url,
        ServerTeacherConfig(timeout=TIMEOUT, retries=4),
        request=ScoreRequest(full=True),
        student=STUDENT,
        token=TOKEN,
        batch_tokens=load.length,
        connections=IN_FLIGHT,
    )


def _score(rank: ServerTeacher, numbers: range, length: int) -> list[ScoredRollout] | Exception:
    try:
        return rank.score([numbered(number, length) for number in numbers])
    except (ConnectionError, ValueError) as error:
        return error


def _connection(server: RunningService) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 0), timeout=60)


def _leave(server: RunningService, load: Load) -> None:
    """Send requests while the queue is long, and leave a second after each."""
    waiting: list[tuple[float, socket.socket]] = []
    time.sleep(1.5)
    for number in load.cut:
        body = request_bytes(
            wire_request_from(
                [numbered(number, load.length)], ScoreRequest(), want=Want.logps, vocab_size=VOCAB
            )
        )
        head = (
            f"POST /score HTTP/1.1\r\nHost: stub\r\nAuthorization: Bearer {TOKEN}\r\n"
            f"Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection = _connection(server)
        connection.sendall(head.encode() + body)
        waiting.append((time.monotonic() + 1.0, connection))
        time.sleep(0.05)
    for until, connection in waiting:
        time.sleep(max(0.0, until - time.monotonic()))
        connection.close()


def _mib(server: RunningService) -> float:
    words = Path(f"/proc/{server.pid}/statm").read_text().split()
    return int(words[1]) * 4096 / (1 << 20)


def _watch(server: RunningService, before: float, growth: list[float], ended: Event) -> None:
    while not ended.wait(0.5):
        growth.append(_mib(server) - before)
