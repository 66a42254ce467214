"""Which checkpoints stay, whether they fit on the disk, and what a full disk leaves."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from opd.config.save import BestMetric, best_metric
from opd.config.schema import problems
from opd.run.recipe import composed, find_recipe
from opd.train.checkpoints import BestCheckpoint, checkpoints, write_checkpoint
from opd.world import World

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
