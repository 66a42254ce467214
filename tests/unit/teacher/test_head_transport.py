"""How the output head is sent: in half the bytes where nothing is lost, and only if it is needed."""

from collections.abc import Iterator, Sequence

import httpx
import numpy as np
import pytest
import torch
from safetensors.numpy import save

from opd.config.teacher import ServerTeacherConfig
from opd.head import HeadSpec
from opd.serving.child import RunningService
from opd.teacher.client import ServerTeacher
from opd.teacher.scoring import folded_head, head_rows
from opd.teacher.sleeping import SleepingTeacher, SleepSwitch
from opd.teacher.wire import read_head_rows
from opd.types import Rollout, ScoredRollout, ScoreRequest
from opd.world import join_world
from tests.support.stub_teacher import (
    STUDENT,
    TOKEN,
    VOCAB,
    WIDTH,
    StubBackend,
    numbered,
    of_teacher,
    running_stub,
)

EXACT = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16().float()
ROUNDED = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with running_stub(1e6, tmp_path_factory.mktemp("log") / "log") as running:
        yield running


@pytest.mark.parametrize(
    ("weight_VD", "scale", "halves"),
    [
        (EXACT, 1.0, True),
        (EXACT, 0.25, True),
        (EXACT, 1 / 3, False),
        (EXACT * 1e-39, 1.0, False),
        (ROUNDED, 1.0, False),
        (EXACT.bfloat16(), 1.0, True),
    ],
)
def test_a_head_is_sent_in_bfloat16_only_if_it_stays_the_same(
    weight_VD: torch.Tensor, scale: float, halves: bool
) -> None:
    rows_VD = folded_head(weight_VD, HeadSpec(vocab_size=7, scale=scale))
    sent = head_rows(rows_VD, bfloat16=True)
    assert (sent.dtype == np.uint16) == halves
    assert head_rows(rows_VD, bfloat16=False).dtype == np.float32
    found = read_head_rows(save({"head": sent}))
    assert found.dtype == np.float32
    assert (found == rows_VD.numpy()).all()


def test_a_client_fetches_half_the_bytes_and_the_whole_head(
    server: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = {"Authorization": f"Bearer {TOKEN}"}
    sizes = [
        len(httpx.get(f"{server.url}/head?start=0&stop={VOCAB}{more}", headers=key).content)
        for more in ("", "&bfloat16=true")
    ]
    assert sizes[0] - sizes[1] == pytest.approx(2 * VOCAB * WIDTH, abs=100)
    monkeypatch.setattr("opd.teacher.client.HEAD_BYTES", 4 * WIDTH * 33)  # 33, 33, and 14 rows
    assert (_client(server, ScoreRequest()).head() == StubBackend(1.0).head_VD.numpy()).all()


@pytest.mark.parametrize("full", [False, True])
def test_a_head_is_fetched_only_for_hidden_states(server: RunningService, full: bool) -> None:
    kept: list[str | None] = []
    teacher = SleepingTeacher(
        _client(server, ScoreRequest(full=full)),
        NoSwitch([]),
        world=join_world(),
        keep_head=kept.append,
    )
    rollouts = [of_teacher(numbered(n, 9), "ba"[n % 2]) for n in range(6)]
    assert len(teacher.score(rollouts)) == 6
    assert kept == (["a", "b"] if full else [])


class NoSwitch(SleepSwitch):
    """For servers that do not sleep."""

    def wake(self) -> None:
        """Nothing."""

    def sleep(self) -> None:
        """Nothing."""


class Interrupted:
    """A teacher that fails."""

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        raise ConnectionError("gone")


def test_after_a_failure_nobody_is_waited_for() -> None:
    barriers: list[int] = []

    class World:
        is_main = True

        def barrier(self) -> None:
            barriers.append(1)

    teacher = SleepingTeacher(Interrupted(), NoSwitch([]), world=World(), keep_head=print)
    with pytest.raises(ConnectionError, match="gone"):
        teacher.score([])
    assert barriers == [1]


def _client(server: RunningService, request: ScoreRequest) -> ServerTeacher:
    return ServerTeacher(
        server.url, ServerTeacherConfig(), request=request, student=STUDENT, token=TOKEN
    )
