"""A run folder may move, and its run go on with another engine and number of processes."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.command import SMALL, opd

COMMAND = [
    "train", "quickstart", *SMALL, "rollout=transformers", "teacher=local", "train.steps=4",
    "save.every=2", "eval.every=0", "train.precision=fp32", "optim=sgd", "rollout.n=1",
    "train.prompts_per_step=8", "data.eval_limit=4", "eval.kl_prompts=0",
    "rollout.batch_size=1",  # else the draws of a completion depend on its batch
]  # fmt: skip
STUDENT = Path(__file__).parents[2] / "recipes" / "quickstart" / "student"
ALONE = ["launch.engine=torch", "launch.processes=1"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def test_a_moved_run_goes_on_with_the_same_bits_and_elsewhere_within_rounding(
    tmp_path: Path,
) -> None:
    assert opd(*COMMAND, *ALONE, "run.dir=whole", cwd=tmp_path).returncode == 0
    begun = opd(*COMMAND, *ALONE, "run.dir=runs/a", "train.stop_after=2", cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    shutil.rmtree(tmp_path / "runs" / "a" / "final")
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "elsewhere")
    (tmp_path / "runs" / "a").rename(tmp_path / "moved")
    moved = opd(*COMMAND, *ALONE, "run.dir=moved", cwd=tmp_path)
    assert moved.returncode == 0, moved.stderr
    assert "starting from step 2" in moved.stdout
    assert "note" not in moved.stderr
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "moved")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = opd(*COMMAND, "launch.processes=2", "zero=3", "run.dir=elsewhere", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    assert "was written with launch.processes=1, launch.engine=torch, zero=1" in other.stderr
    start, there = load_file(STUDENT / "model.safetensors"), weights(tmp_path / "elsewhere")
    for name in expected:
        moved_by = (expected[name] - start[name]).norm()
        assert float((there[name] - expected[name]).norm() / moved_by) < 1e-3, name
    rows = [json.loads(r) for r in (tmp_path / "elsewhere/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
