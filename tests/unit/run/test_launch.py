"""``opd train quickstart`` on machines with GPUs: every child process, with its arguments and environment."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opd.cli.main import run
from opd.config.arguments import parse_arguments
from opd.config.teacher import TeacherServerConfig
from opd.run import launch, teacher_servers
from opd.run import ranks as rank_processes
from opd.run.devices import find_cards
from opd.run.place import place
from opd.run.ranks import WorkerFailed
from opd.run.recipe import Recipe, composed, find_recipe
from opd.run.study import run_study
from opd.run.train import train
from tests.support.cuda import pretend_cards


class Children:
    """Stands in for the start of processes; keeps what each would have been given."""

    def __init__(self) -> None:
        self.services: list[tuple[list[str], Mapping[str, str]]] = []
        self.ranks: list[tuple[list[str], Mapping[str, str]]] = []

    @contextmanager
    def service(
        self, name: str, arguments: Sequence[str], *, environment: Mapping[str, str], **_: Any
    ) -> Iterator[SimpleNamespace]:
        self.services.append((list(arguments), environment))
        url = f"http://127.0.0.1:{len(self.services)}"
        yield SimpleNamespace(url=url, token="t", pid=0, status=lambda: None, close=lambda: None)

    def rank(
        self, words: Sequence[str], *, env: Mapping[str, str], stderr: Any, **_: Any
    ) -> subprocess.Popen[bytes]:
        self.ranks.append((list(words), env))
        stderr.write(b"the rank ended at once\n")
        return subprocess.Popen(["false"])


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Children:
    children = Children()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(teacher_servers, "started_service", children.service)
    monkeypatch.setattr(launch, "started_service", children.service)
    pretended = SimpleNamespace(
        Popen=children.rank,
        DEVNULL=subprocess.DEVNULL,
        TimeoutExpired=subprocess.TimeoutExpired,
    )
    monkeypatch.setattr(rank_processes, "subprocess", pretended)
    return children


ADDRESSES = ("OPD_TEACHER_URL", "OPD_TEACHER_URLS")
QUICK = ("eval.teacher_accuracy=false", "eval.kl_prompts=8", "data.eval_limit=8")


@pytest.mark.parametrize(
    ("count", "visible", "ranks"),
    [(0, "", 2), (1, None, 1), (2, "4,6", 2), (8, None, 8)],
)
def test_the_demo_starts_on_these_gpus(
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    visible: str | None,
    ranks: int,
) -> None:
    pretend_cards(monkeypatch, count, visible=visible)
    with pytest.raises(WorkerFailed, match="the rank ended at once"):
        train("quickstart", *QUICK)
    names = visible.split(",") if visible else [str(n) for n in range(count)]
    assert len(children.ranks) == ranks
    for rank, (words, environment) in enumerate(children.ranks):
        config = composed(find_recipe(words[3]), words[4:]).config
        assert config.launch.processes == ranks
        assert environment["LOCAL_RANK"] == environment["RANK"] == str(rank)
        assert environment["WORLD_SIZE"] == environment["LOCAL_WORLD_SIZE"] == str(ranks)
        assert environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"
        addresses = [environment.get(name, "") for name in ADDRESSES]
        assert "http://127.0.0.1:1" in " ".join(addresses)
        if count:
            assert environment["CUDA_VISIBLE_DEVICES"].split(",") == names
            assert config.rollout.gpu_memory_utilization == 0.35
        else:
            assert environment["CUDA_VISIBLE_DEVICES"] == ""
            assert config.rollout.gpu_memory_utilization is None
    [(arguments, environment)] = children.services
    teacher = parse_arguments(TeacherServerConfig, arguments[3:])
    assert (teacher.tensor_parallel_size, teacher.gpu_memory_utilization) == (1, 0.45)
    assert environment["CUDA_VISIBLE_DEVICES"] == (names[0] if count else "")


class FirstRun(Exception):
    """Ends a study at its first run."""


def test_a_study_s_runs_leave_the_shared_teacher_its_gpu(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, 4)
    recipe = composed(
        find_recipe("quickstart_subnetwork"), ["teacher.devices='1'", "launch.processes=3"]
    )
    placement = place(recipe.config, find_cards())

    def run_first(one: Recipe, folder: Path) -> None:
        own = place(one.config, find_cards())
        assert own.cards.visible(own.rank_cards) == {"CUDA_VISIBLE_DEVICES": "0,2,3"}
        assert own.teachers == ()
        assert one.config.rollout.gpu_memory_utilization == 0.35
        assert one.config.teacher.url == "http://127.0.0.1:1"
        raise FirstRun

    with pytest.raises(FirstRun):
        run_study(recipe, placement, Path("study"), run_first)
    [(_, environment)] = children.services
    assert environment["CUDA_VISIBLE_DEVICES"] == "1"
    left = {*ADDRESSES, "CUDA_VISIBLE_DEVICES"} & os.environ.keys()
    assert left == set(), "a later run starts a teacher of its own"


def test_rollout_servers_are_started_on_gpus_of_their_own(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, 4)
    settings = ("rollout=server", "rollout.servers=2", "rollout.devices='3,2'", "teacher=local")
    with pytest.raises(WorkerFailed, match="the rank ended at once"):
        train("quickstart", *QUICK, *settings)
    cards = [environment["CUDA_VISIBLE_DEVICES"] for _, environment in children.services]
    assert sorted(cards) == ["2", "3"]
    assert {environment["CUDA_VISIBLE_DEVICES"] for _, environment in children.ranks} == {"0,1"}


def test_the_plan_says_who_would_sit_where(
    children: Children, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_cards(monkeypatch, 2, visible="4,6")
    assert run(["train", "quickstart", "dry_run=true"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "placement 2 GPU(s) Pretended GPU, 80 GiB" in printed
    assert "process(es) on GPU 4, 6, each with an engine (0.35 of it)" in printed
    assert "teacher on GPU 4 (0.45 of it)" in printed
    assert children.services == children.ranks == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launch.processes=3"], "launch.processes=3 needs as many GPUs and 2 can be seen"),
        (["teacher.devices=2"], "teacher.devices=2 names 2, and the visible GPUs are 0, 1"),
        (["teacher.tensor_parallel_size=7"], "teacher.tensor_parallel_size=7 does not divide"),
        (["teacher.gpu_memory_utilization=0.95"], "leaves too little to the others"),
        (["rollout=server", "rollout.servers=3"], "would put two engines on one GPU"),
    ],
    ids=str,
)
def test_a_placement_that_cannot_be_is_refused_before_anything_starts(
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    words: str,
) -> None:
    pretend_cards(monkeypatch, 2)
    assert run(["train", "quickstart", *overrides]) == 2
    complaint = capsys.readouterr().err
    assert words in complaint
    assert complaint.count("\n") == 1
    assert children.services == children.ranks == []
    assert not Path("runs").exists()
