"""A teacher that sleeps scores as one that does not, and is awake only while the ranks score.

The stub's weights and head are NaN while it sleeps, so nothing can read them unnoticed.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest

from opd.assembly.served_teacher import put_to_sleep, served_clients
from opd.config.teacher import ServerTeacherConfig
from opd.serving.child import RunningService
from opd.teacher.client import ServerTeacher
from opd.teacher.local import LocalTeacher
from opd.tracking.console import SilentProgress
from opd.types import ScoreRequest
from opd.world import join_world
from tests.support.sleeping_ranks import share
from tests.support.stub_teacher import (
    EVENTS,
    STUDENT,
    TOKEN,
    VARIABLE,
    StubBackend,
    numbered,
    running_stub,
)

REPOSITORY = Path(__file__).parents[2]
RANKS, STEPS = 2, 3
KEY = {"Authorization": f"Bearer {TOKEN}"}


PLACES = {"one server": ("{0}", 1), "replicas": ("{0},{1}", 2), "pool": ("a={0},{1};b={2}", 3)}
"""Where the addresses of servers stand in the setting of a teacher, and how many there are."""


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    file = tmp_path_factory.mktemp("events") / "events"
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EVENTS, str(file))
        patch.setenv(VARIABLE, TOKEN)
        yield file


@pytest.fixture(scope="module")
def servers(events: Path) -> Iterator[list[RunningService]]:
    """Three that sleep, and sleep since their start."""
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        starting = [
            running_stub(20_000, events.with_name(f"{i}.log"), sleep=True) for i in range(3)
        ]
        yield list(pool.map(stack.enter_context, starting))


def test_a_server_sleeps_before_it_is_ready(servers: list[RunningService], events: Path) -> None:
    assert _names(events) == ["sleep"] * len(servers)


@pytest.fixture(scope="module")
def steps(servers: list[RunningService], events: Path) -> dict[str, tuple[list[str], Path]]:
    """For each place what happened while two ranks worked, in order, and the folder of their scores."""
    out, before = events.with_name("out"), len(_names(events))
    out.mkdir()
    _run_ranks([where.format(*(s.url for s in servers)) for where, _ in PLACES.values()], out)
    names = " ".join(_names(events)[before:]).split("place")
    return {
        place: (happened.split(), out / f"{number}")
        for number, (place, happened) in enumerate(zip(PLACES, names[1:], strict=True))
    }


@pytest.mark.parametrize("place", PLACES)
def test_a_teacher_is_awake_only_while_ranks_score(
    place: str, steps: dict[str, tuple[list[str], Path]]
) -> None:
    names, _ = steps[place]
    switches = STEPS * PLACES[place][1]
    assert names.count("wake") == names.count("sleep") == switches, "once a step and server"
    assert names.count("learn") == names.count("learned") == STEPS * RANKS
    _require_order(names)


@pytest.mark.parametrize("place", PLACES)
def test_a_teacher_that_sleeps_between_the_steps_scores_as_one_that_does_not(
    place: str, steps: dict[str, tuple[list[str], Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(EVENTS)
    local = LocalTeacher(StubBackend(1e9), request=ScoreRequest(full=True), student=STUDENT)
    for step in range(STEPS):
        for rank in range(RANKS):
            found = np.load(steps[place][1] / f"{step}_{rank}.npz").values()
            for logps, expected in zip(found, local.score(share(step, rank)), strict=True):
                logits = expected.hidden @ local.head().T
                shifted = logits - logits.max(axis=1, keepdims=True)
                whole = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
                assert np.abs(logps - whole).max() < 1e-4


def _names(events: Path) -> list[str]:
    return [line.split()[1] for line in events.read_text().splitlines()]


def _require_order(names: list[str]) -> None:
    """Nothing is scored asleep; no rank generates or learns while a server is awake."""
    awake = learning = 0
    for name in names:
        match name:
            case "wake":
                assert learning == 0
                awake += 1
            case "sleep":
                awake -= 1
            case "score" | "scored":
                assert awake > 0
            case "generate" | "learn":
                assert awake == 0
                learning += name == "learn"
            case "learned":
                assert awake == 0
                learning -= 1
            case _:
                raise AssertionError(name)


def test_scores_and_heads_that_are_requested_asleep_wake_the_teacher(
    servers: list[RunningService], events: Path
) -> None:
    server, before = servers[0], len(_names(events))
    local = LocalTeacher(StubBackend(1e9), request=ScoreRequest(full=True), student=STUDENT)
    client = ServerTeacher(
        server.url,
        ServerTeacherConfig(),
        request=ScoreRequest(full=True),
        student=STUDENT,
        token=TOKEN,
    )
    for number in range(3):
        (scored,) = client.score([numbered(number, 40)])
        (expected,) = local.score([scored.rollout])
        assert (scored.logps == expected.logps).all()
        assert (scored.hidden == expected.hidden).all()
        for _ in range(2):
            assert httpx.post(f"{server.url}/sleep", headers=KEY).status_code == 204
        assert (client.head() == local.head()).all()
        assert httpx.post(f"{server.url}/sleep", headers=KEY).status_code == 204
    for _ in range(2):
        assert httpx.post(f"{server.url}/wake_up", headers=KEY).status_code == 204
    names = _names(events)[before:]
    assert (names.count("wake"), names.count("sleep")) == (2 * 3 + 1, 2 * 3)


def test_only_a_caller_with_the_token_switches_a_server(servers: list[RunningService]) -> None:
    for path in ("/sleep", "/wake_up"):
        assert httpx.post(servers[0].url + path).status_code == 401


def test_a_server_without_sleep_is_refused(events: Path, tmp_path: Path) -> None:
    with running_stub(1e6, tmp_path / "log") as server:
        config = ServerTeacherConfig(url=server.url, sleep=True)
        clients = served_clients(config, STUDENT, [ScoreRequest()], SilentProgress())
        with pytest.raises(ValueError, match="start it with sleep=true"):
            put_to_sleep(config, clients, lambda name: None, join_world())


def test_a_replica_that_is_gone_does_not_end_the_run(
    servers: list[RunningService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opd.serving.client.FIRST_BACKOFF_S", 0.001)
    monkeypatch.setattr("opd.serving.client.MAX_BACKOFF_S", 0.002)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}"
        config = ServerTeacherConfig(url=f"{gone},{servers[0].url}", sleep=True, retries=1)
        clients = served_clients(config, STUDENT, [ScoreRequest()], SilentProgress())
        (teacher,) = put_to_sleep(config, clients, lambda name: None, join_world())
        assert len(teacher.score([numbered(number, 40) for number in range(6)])) == 6


def _run_ranks(places: list[str], out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.sleeping_ranks", str(out), str(STEPS), *places],
            cwd=REPOSITORY,
            env=os.environ
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
        )
        for rank in range(RANKS)
    ]
    try:
        assert [process.wait(900) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()
