"""``opd train`` with a mask: found, trained, interrupted, resumed, used again, exported and undone."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.checkpoint.tensors import open_checkpoint
from opd.mask.mask import Mask
from tests.support.command import SMALL, opd

pytestmark = pytest.mark.timeout(1500)  # the fixture is two runs
MASKED = [
    *SMALL,
    "run.dir=run",
    "mask=discover",
    "mask.rule=near_zero",
    "mask.density=0.1",
    "train.steps=4",
    "eval.every=0",
    "save.every=2",
    "optim.weight_decay=0.1",
    "launch.processes=2",
    "rollout=server",
    "sync.verify_every=1",
    "record=weights",
    "record.every=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that stopped after two steps and went on."""
    home = tmp_path_factory.mktemp("masked")
    stopped = opd("train", "quickstart", *MASKED, "train.stop_after=2", cwd=home)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    shutil.copytree(home / "run" / "final", home / "halfway")
    done = opd("train", "quickstart", *MASKED, cwd=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "run"


def assert_confined(student: Path, final: Path, mask_path: Path) -> None:
    base, mask, found = open_checkpoint(str(student)), Mask.read(mask_path), load_file(final)
    assert mask.density == pytest.approx(0.1, abs=1e-5)
    moved = 0
    for name, tensor in found.items():
        start = base[name].read().to(tensor.dtype)
        differs = (tensor != start).flatten()
        moved += int(differs.sum())
        kept = torch.zeros(differs.shape, dtype=torch.bool)
        kept[mask.indices[name].long()] = True
        assert not differs[~kept].any(), name
    assert moved > 0.8 * sum(mask.counts().values())


def test_the_exported_model_differs_from_the_base_on_the_mask_only(
    run: Path, quickstart: Path
) -> None:
    mask = run / "mask.safetensors"
    assert_confined(quickstart / "student", run / "final" / "model.safetensors", mask)


def test_a_run_that_stopped_goes_on_and_moves_on(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["mask/density"] == pytest.approx(0.1, abs=1e-5) for row in rows[1:])
    halfway = load_file(run.parent / "halfway" / "model.safetensors")
    final = load_file(run / "final" / "model.safetensors")
    assert any(not torch.equal(halfway[name], final[name]) for name in final)


def test_only_the_values_of_the_mask_travel_to_the_rollout_server(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = sum(Mask.read(run / "mask.safetensors").counts().values())
    snapshots = [row["step"] for row in rows if row["sync/snapshots"]]
    assert snapshots == [0]
    # the first patch after a start brings the coordinates along: steps 1 and 3
    assert max(rows[step]["sync/bytes"] for step in (2, 4)) < 4 * kept * 1.01 + 2000
    assert all(row["sync/gap"] < 1e-3 for row in rows)


def test_the_record_of_the_weights_is_what_the_run_left(run: Path, quickstart: Path) -> None:
    rows = [json.loads(line) for line in (run / "weights.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    base = open_checkpoint(str(quickstart / "student"))
    for row, folder in ((rows[1], run.parent / "halfway"), (rows[2], run / "final")):
        now = load_file(folder / "model.safetensors")
        pairs = [(base[name].read().flatten(), now[name].flatten()) for name in now]
        same = torch.cat([start.float() == after for start, after in pairs])
        same_seen = torch.cat([start.bfloat16() == after.bfloat16() for start, after in pairs])
        assert row["all"]["weights"] == len(same)
        assert row["all"]["fp32"]["exact_zero"] == pytest.approx(float(same.double().mean()))
        assert row["all"]["bf16"]["exact_zero"] == pytest.approx(float(same_seen.double().mean()))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["weights/unchanged"] == rows[2]["all"]["bf16"]["exact_zero"]
    assert "Never, cancelled, final" in (run / "report.html").read_text()


def test_checkpoints_hold_what_is_trained_and_no_more(run: Path, quickstart: Path) -> None:
    kept = sum(Mask.read(run / "mask.safetensors").counts().values())
    files = (run / "checkpoints" / "step_000004").rglob("*.pt")
    # weights, masters and two moments in float32, and the names of a few things; of the record a
    # bit per weight, and 8 directions of every matrix twice
    record = 440_000 / 8 + 2 * 2 * 8 * 5_000
    assert sum(file.stat().st_size for file in files) < 4 * 4 * kept * 1.1 + 200_000 + record


def test_a_mask_file_starts_a_run_and_another_one_cannot_go_on_with_it(
    run: Path, quickstart: Path
) -> None:
    dropped = ("mask", "run.dir", "launch", "rollout")
    again = [o for o in MASKED if not o.startswith(dropped)]
    again += ["run.dir=again", "mask=file", "launch.engine=torch", "launch.processes=1"]
    again += ["train.steps=2", "mask.training=restore"]
    done = opd("train", "quickstart", *again, f"mask.path={run}/mask.safetensors", cwd=run.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    final = run.parent / "again" / "final" / "model.safetensors"
    assert_confined(quickstart / "student", final, run / "mask.safetensors")
    (run / "mask.safetensors").replace(run.parent / "moved.safetensors")
    made = opd(
        "mask",
        "discover",
        f"base={quickstart / 'student'}",
        "rule=random",
        "density=0.1",
        f"out={run}/mask.safetensors",
        cwd=run.parent,
    )
    assert made.returncode == 0, made.stderr
    refused = opd(
        "train", "quickstart", *again, f"mask.path={run}/mask.safetensors", cwd=run.parent
    )
    (run.parent / "moved.safetensors").replace(run / "mask.safetensors")
    assert refused.returncode == 2
    assert "was started with another mask" in refused.stderr


def test_a_masked_run_travels_as_a_small_file_and_back(run: Path, quickstart: Path) -> None:
    """final/ holds float32; rounded to the base's bf16 it is base + delta, bit for bit."""
    home, student = run.parent, quickstart / "student"
    commands = [
        ["export", f"base={student}", "trained=run", "out=delta.safetensors", "dtype=bfloat16"],
        ["apply", f"base={student}", "delta=delta.safetensors", "out=applied"],
        ["undo", "trained=applied", "delta=delta.safetensors", "out=undone"],
    ]
    for command in commands:
        done = opd("mask", *command, cwd=home)
        assert done.returncode == 0, done.stderr
    applied, undone = (load_file(home / f / "model.safetensors") for f in ("applied", "undone"))
    final = load_file(run / "final" / "model.safetensors")
    base = load_file(student / "model.safetensors")
    assert applied.keys() == final.keys()
    for name, tensor in final.items():
        assert torch.equal(applied[name], tensor.bfloat16()), name
        assert torch.equal(undone[name], base[name]), name
    assert (home / "delta.safetensors").stat().st_size < 0.5 * sum(t.nbytes for t in base.values())
