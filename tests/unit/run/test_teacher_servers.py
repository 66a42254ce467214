"""Which devices each server of a teacher gets, and what its settings become."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd.config.teacher import ServedTeacherConfig
from opd.run import teacher_servers
from opd.run.commands import teacher_server_config
from opd.run.place import place
from opd.run.placement import Cards, PlacedServer
from opd.run.recipe import load_recipe
from opd.run.teacher_servers import started_teachers

EIGHT = Cards(count=8)
POOL = ("teacher=pool", "teacher.model=null", "+teacher.members.a=m", "+teacher.members.b=n")


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The devices of each server that would be started, by the name of its log."""
    found: dict[str, str | None] = {}

    @contextmanager
    def start(
        *_: object, log_path: Path, token: str, environment: Mapping[str, str], **__: object
    ) -> Iterator[SimpleNamespace]:
        found[log_path.name] = environment.get("CUDA_VISIBLE_DEVICES")
        url = f"http://{log_path.stem}:1"
        yield SimpleNamespace(url=url, token=token, status=lambda: None, close=lambda: None)

    monkeypatch.setattr(teacher_servers, "started_service", start)
    return found


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("teacher.devices='0,1'", "teacher.tensor_parallel_size=2"),
            {"teacher.log": "0,1"},
        ),
        (
            (
                "teacher.devices='4,5,6,7'",
                "teacher.replicas=2",
                "teacher.tensor_parallel_size=2",
            ),
            {"teacher_0.log": "4,5", "teacher_1.log": "6,7"},
        ),
        (
            (*POOL, "teacher.devices='6,7'", "teacher.replicas=2"),
            {
                "teacher_0_0.log": "6",
                "teacher_0_1.log": "7",
                "teacher_1_0.log": "6",
                "teacher_1_1.log": "7",
            },
        ),
    ],
)
def test_replicas_divide_the_devices(
    overrides: tuple[str, ...],
    expected: dict[str, str],
    devices: dict[str, str | None],
    tmp_path: Path,
) -> None:
    config = load_recipe("quickstart", "launch.processes=4", *overrides).config
    placement = place(config, EIGHT, read_shape=lambda model: None)
    with started_teachers(config, placement, tmp_path) as started:
        assert devices == expected
        urls = json.loads(started.environment["OPD_TEACHER_URLS"])
    assert sum(map(len, urls.values())) == len(expected)


def test_replicas_without_devices_of_their_own_have_none_on_a_cpu(
    devices: dict[str, str | None], tmp_path: Path
) -> None:
    config = load_recipe("quickstart", "launch.processes=1", "teacher.replicas=2").config
    with started_teachers(config, place(config, Cards(count=0)), tmp_path):
        assert devices == {"teacher_0.log": None, "teacher_1.log": None}


def test_a_server_has_the_engine_settings_of_its_teacher() -> None:
    config = load_recipe(
        "quickstart", "teacher.max_waiting_tokens=77", "teacher.replicas=3", "teacher.sleep=true"
    ).config
    assert isinstance(config.teacher, ServedTeacherConfig)
    placed = PlacedServer(model="m", cards=(0, 1, 2, 3), gpu_memory_utilization=0.3)
    server = teacher_server_config(config, placed)
    assert (server.model, server.max_waiting_tokens, server.tensor_parallel_size) == ("m", 77, 4)
    assert (server.gpu_memory_utilization, server.sleep) == (0.3, True)
