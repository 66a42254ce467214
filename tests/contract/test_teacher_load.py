"""Many ranks at one teacher: a real HTTP server and real clients, a back end that sleeps per token."""

import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Event, Thread

import httpx
import numpy as np
import pytest

from opd.config.teacher import ServerTeacherConfig
from opd.serving.app import MEDIA_TYPE
from opd.serving.child import RunningService
from opd.serving.receiving import receive
from opd.teacher.client import ServerTeacher
from opd.teacher.local import LocalTeacher
from opd.teacher.wire import Want, read_response, request_bytes, wire_request_from
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


LOAD_S = float(os.environ.get("OPD_LOAD_SECONDS", "600"))
"""How long the hostile load lasts; its first tenth, at most a minute, is not measured."""
CUT, MALFORMED = 0.05, 0.02
KNOWN = 32
"""Different requests, whose scores are computed beforehand."""


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one client sent and got."""

    answered: int = 0
    wrong: int = 0
    failed: int = 0
    cut: int = 0
    refused: int = 0
    accepted_malformed: int = 0


def _known_requests() -> list[tuple[bytes, np.ndarray]]:
    """(body, right log-probs) of each."""
    rollouts = [numbered(number, 200) for number in range(KNOWN)]
    local = LocalTeacher(StubBackend(1e9), request=ScoreRequest(), student=STUDENT)
    bodies = [
        request_bytes(wire_request_from([each], ScoreRequest(), want=Want.logps, vocab_size=VOCAB))
        for each in rollouts
    ]
    scored = local.score(rollouts)
    return [(body, np.asarray(each.logps)) for body, each in zip(bodies, scored, strict=True)]


def _malform(body: bytes, draw: random.Random) -> bytes:
    """A body that no reader can take: cut short, noise, or another format."""
    kinds = (body[: draw.randrange(len(body))], draw.randbytes(200), body.replace(b"opd-", b"odd-"))
    return draw.choice(kinds)


def _hostile_client(
    server: RunningService, number: int, known: list[tuple[bytes, np.ndarray]], until: float
) -> Tally:
    draw, tally = random.Random(number), Tally()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": MEDIA_TYPE}
    with httpx.Client(base_url=server.url, headers=headers, timeout=300, trust_env=False) as client:
        while time.monotonic() < until:
            body, logps = draw.choice(known)
            kind = draw.random()
            if kind < CUT:
                _send_and_leave(server, body, draw)
                tally.cut += 1
                continue
            is_malformed = kind < CUT + MALFORMED
            content = _malform(body, draw) if is_malformed else body
            status, answer = _post(client, content)
            if is_malformed:
                tally.refused += status == 400
                tally.accepted_malformed += status != 400
            elif status == 200:
                tally.answered += 1
                tally.wrong += not np.array_equal(read_response(answer).logps, logps)
            else:
                tally.failed += 1
    return tally


def _post(client: httpx.Client, content: bytes) -> tuple[int, bytes]:
    """Status and body, behind the lines about a wait if there are any."""
    with client.stream("POST", "/score", content=content) as stream:
        response = receive(stream, timeout=300, max_bytes=1 << 20, tokens=1)
    return response.status_code, response.content


def _send_and_leave(server: RunningService, body: bytes, draw: random.Random) -> None:
    """A part of a request, or all of it, and a closed connection."""
    head = (
        f"POST /score HTTP/1.1\r\nHost: stub\r\nAuthorization: Bearer {TOKEN}\r\n"
        f"Content-Type: {MEDIA_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    whole = head.encode() + body
    with _connection(server) as link:
        link.sendall(whole[: draw.choice((len(head) // 2, len(whole) - 7, len(whole)))])


@pytest.mark.slow
@pytest.mark.timeout(LOAD_S + 1200)
def test_cut_connections_and_malformed_bodies_harm_nobody(tmp_path: Path) -> None:
    known = _known_requests()
    growth, ended = list[float](), Event()
    with running_stub(1e7, tmp_path / "log", max_waiting_tokens=1 << 16) as server:
        started = time.monotonic()
        watcher = Thread(target=_watch, args=(server, 0.0, growth, ended))
        watcher.start()
        with ThreadPoolExecutor(RANKS) as pool:
            until = started + LOAD_S
            tallies = list(
                pool.map(lambda n: _hostile_client(server, n, known, until), range(RANKS))
            )
        ended.set()
        watcher.join()
        assert httpx.get(f"{server.url}/health", timeout=60).text == "ok"
    total = {f.name: sum(getattr(t, f.name) for t in tallies) for f in fields(Tally)}
    warm = int(len(growth) * min(60.0, LOAD_S / 4) / LOAD_S)
    settled = growth[warm:]
    early, late = (float(np.median(part)) for part in (settled[:40], settled[-40:]))
    print(f"{total}, {early:.0f} MiB after the start, {late:.0f} MiB at the end")
    assert min(t.answered for t in tallies) > 0, "no client starves"
    assert total["answered"] > 50 * RANKS
    assert (total["wrong"], total["failed"], total["accepted_malformed"]) == (0, 0, 0)
    assert total["cut"] > 0.02 * total["answered"]
    assert total["refused"] > 0.01 * total["answered"]
    assert late < 1.02 * early
