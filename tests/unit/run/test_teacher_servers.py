"""Which devices each server of a teacher gets, and what its settings become."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig, ServedTeacherConfig, ServerTeacherConfig
from opd.run import teacher_servers
from opd.run.teacher_servers import server_config, started_teachers
from opd.serving.child import RunningService


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """The devices of each server that would be started, by the name of its log."""
    found: dict[str, str | None] = {}

    @contextmanager
    def start(
        config: object, *, log_path: Path, devices: str | None, token: str
    ) -> Iterator[RunningService]:
        found[log_path.name] = devices
        yield RunningService(url=f"http://{log_path.stem}:1", token=token, pid=1)

    monkeypatch.setattr(teacher_servers, "running_teacher", start)
    return found


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (ServerTeacherConfig(model="m", devices="0,1"), {"teacher.log": "0,1"}),
        (
            ServerTeacherConfig(model="m", replicas=2),
            {"teacher_0.log": None, "teacher_1.log": None},
        ),
        (
            ServerTeacherConfig(model="m", devices="4,5,6,7", replicas=2, tensor_parallel_size=2),
            {"teacher_0.log": "4,5", "teacher_1.log": "6,7"},
        ),
        (
            PoolTeacherConfig(members={"a": "m", "b": "n"}, devices="6,7", replicas=2),
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
    teacher: ServedTeacherConfig,
    expected: dict[str, str | None],
    devices: dict[str, str | None],
    tmp_path: Path,
) -> None:
    with started_teachers(Config(teacher=teacher), tmp_path) as started:
        assert devices == expected
        urls = json.loads(started.environment["OPD_TEACHER_URLS"])
    assert sum(map(len, urls.values())) == len(expected)


def test_a_server_has_the_engine_settings_of_its_teacher() -> None:
    config = ServerTeacherConfig(max_waiting_tokens=77, tensor_parallel_size=4, replicas=3)
    server = server_config(config, "m")
    assert (server.model, server.max_waiting_tokens, server.tensor_parallel_size) == ("m", 77, 4)
