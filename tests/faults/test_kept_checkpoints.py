"""Which checkpoints stay, whether they fit on the disk, and what a full disk leaves."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from opd.config.optim import AdamWConfig
from opd.config.save import BestMetric, best_metric
from opd.config.schema import Config, problems
from opd.config.train import Precision
from opd.run.disk import check_space, checkpoint_bytes, written_at_once
from opd.run.model_facts import read_facts
from opd.run.recipe import composed, find_recipe
from opd.train.checkpoints import BestCheckpoint, checkpoints, write_checkpoint
from opd.world import World
from tests.support.learners import QUICKSTART as QUICKSTART_STUDENT
from tests.support.learners import Setup, build_learner, quickstart_student

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
ACCURACY = BestMetric(name="eval/heldout/accuracy", highest=True)
QUICKSTART = find_recipe("quickstart")


def save(partial: str) -> None:
    (Path(partial) / "rank_0.pt").write_bytes(b"state")


def write_steps(
    folder: Path, values: dict[int, float | None], *, keep: int, metric: BestMetric = ACCURACY
) -> list[str]:
    """The names of the checkpoints that stay."""
    for step, value in values.items():
        best = BestCheckpoint(folder, metric)  # as after a resume
        metrics = {} if value is None else {metric.name: value}
        write_checkpoint(folder, step, save, keep=keep, world=ALONE, best=best, metrics=metrics)
    return [path.name for path in checkpoints(folder)]


def test_the_best_checkpoint_stays_and_is_named(tmp_path: Path) -> None:
    values = {1: 0.2, 2: 0.7, 3: None, 4: math.nan, 5: 0.7, 6: 0.6}
    assert write_steps(tmp_path, values, keep=2) == ["step_000002", "step_000005", "step_000006"]
    named = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert named == {"step": 2, "metric": "eval/heldout/accuracy", "value": 0.7}
    assert (tmp_path / "checkpoints" / "best").resolve().name == "step_000002"
    assert write_steps(tmp_path, {7: 0.8}, keep=1) == ["step_000007"]
    shutil.move(tmp_path / "checkpoints", tmp_path / "moved" / "checkpoints")
    assert (tmp_path / "moved" / "checkpoints" / "best" / "rank_0.pt").is_file()


def test_the_lowest_may_be_the_best(tmp_path: Path) -> None:
    lowest = BestMetric(name="loss/total", highest=False)
    kept = write_steps(tmp_path, {1: 2.0, 2: 1.0, 3: 3.0, 4: 1.5}, keep=1, metric=lowest)
    assert kept == ["step_000002", "step_000004"]
    best = BestCheckpoint(tmp_path, lowest)
    assert best.improves({"loss/total": 0.5})
    assert not best.needs_saving({"loss/total": 0.5}), "no evaluation: at the steps of save.every"
    assert BestCheckpoint(tmp_path, ACCURACY).needs_saving({ACCURACY.name: 0.1}), "another metric"


def test_a_best_checkpoint_that_is_gone_or_garbled_is_none(tmp_path: Path) -> None:
    write_steps(tmp_path, {1: 0.9, 2: 0.5}, keep=1)
    shutil.rmtree(tmp_path / "checkpoints" / "step_000001")
    assert BestCheckpoint(tmp_path, ACCURACY).folder is None
    assert write_steps(tmp_path, {3: 0.1}, keep=1) == ["step_000003"]
    (tmp_path / "checkpoints" / "best.json").write_text("[1]")
    assert BestCheckpoint(tmp_path, ACCURACY).improves({ACCURACY.name: 0.0})


@pytest.mark.parametrize(
    ("given", "metric"),
    [
        ("accuracy", ACCURACY),
        ("reverse_kl", BestMetric(name="eval/heldout/reverse_kl", highest=False)),
        ("min:loss/total", BestMetric(name="loss/total", highest=False)),
        ("max:reward/mean", BestMetric(name="reward/mean", highest=True)),
    ],
)
def test_the_best_is_by_a_metric_with_a_direction(given: str, metric: BestMetric) -> None:
    config = composed(QUICKSTART, [f"save.keep_best={given}", "eval.task=heldout"]).config
    assert best_metric(config) == metric
    assert not [p for p in problems(config) if "keep_best" in p]


@pytest.mark.parametrize("given", ["loss/total", "max:", "best", "high:loss/total"])
def test_a_metric_without_a_direction_is_refused(given: str) -> None:
    config = composed(QUICKSTART, [f"save.keep_best={given}"]).config
    (found,) = [p for p in problems(config) if "keep_best" in p]
    assert "allowed are accuracy, mean_at_k, reverse_kl, and max:NAME or min:NAME" in found


FILL = """
import resource, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from opd.faults import RunError
from opd.train.checkpoints import checkpoints, set_damaged_aside, write_checkpoint
from opd.world import World
folder, writer, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))

def save(partial):
    state = {"w": torch.zeros(size)}
    path = Path(partial) / "state"
    match writer:
        case "torch": torch.save(state, path)
        case "safetensors": save_file(state, path)
        case "text": path.write_text("x" * 4 * size)

size = 20_000
write_checkpoint(folder, 1, save, keep=1, world=ALONE)
size = 200_000
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    write_checkpoint(folder, 2, save, keep=1, world=ALONE)
except RunError as error:
    print(error)
print([p.name for p in (folder / "checkpoints").iterdir()], set_damaged_aside(folder))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(folder: Path, writer: str, limit: int) -> tuple[str, str]:
    command = [sys.executable, "-c", FILL, str(folder), writer, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sentence, left = done.stdout.splitlines()
    return sentence, left


@pytest.mark.parametrize("writer", ["torch", "safetensors", "text"])
def test_a_file_that_grows_too_large_leaves_the_checkpoint_before(
    tmp_path: Path, writer: str
) -> None:
    sentence, left = fill(tmp_path, writer, 200_000)
    assert f"free in {tmp_path} for the checkpoint of step 2, which needs about 0.1 MiB" in sentence
    assert sentence.startswith("the disk is full: ")
    assert "the checkpoint step_000001 is whole: free some space" in sentence
    assert left == "['step_000001'] []"


def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path) -> None:
    sentence, left = fill(small_disk, "torch", 0)
    assert sentence.startswith("the disk is full: 0.")
    assert left == "['step_000001'] []"


def recipe_config(*overrides: str) -> Config:
    return composed(QUICKSTART, ["launch.processes=1", *overrides]).config


@pytest.mark.parametrize("case", ["torch/fp32", "torch/bf16", "torch/pure_bf16"])
def test_the_forecast_of_a_checkpoint_is_its_size(tmp_path: Path, case: str) -> None:
    _, precision = case.split("/")
    setup = Setup(
        model=quickstart_student,
        zero=None,
        precision=Precision(precision),
        optim=AdamWConfig(),
        steps=1,
        max_tokens=100,
    )
    build_learner(setup, ALONE).save(str(tmp_path))
    size = sum(p.stat().st_size for p in tmp_path.iterdir())
    config = recipe_config("launch.engine=torch", f"train.precision={precision}")
    found = checkpoint_bytes(config, read_facts(str(QUICKSTART_STUDENT)))
    assert found == pytest.approx(size, rel=0.1)


def test_a_run_that_does_not_fit_on_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe_config("save.every=10", "train.steps=100", "save.keep=2")
    words = check_space(config, tmp_path / "run", 0)
    assert words is not None
    assert words.startswith("3 checkpoint(s) of ")
    monkeypatch.setattr("opd.run.disk.free_bytes", lambda folder: 1 << 20)
    with pytest.raises(
        ValueError, match=r"where 1.0 MiB are free: free some space, lower save\.keep"
    ):
        check_space(config, tmp_path / "run", 0)
    assert check_space(recipe_config("save.disk_check=false"), tmp_path / "run", 0)
    assert written_at_once(recipe_config("save.every=0"), 0) == 1
    assert written_at_once(recipe_config("save.every=10", "save.keep_best=accuracy"), 0) == 4
    assert written_at_once(recipe_config("train.steps=20", "save.every=10"), 15) == 1
