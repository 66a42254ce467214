"""kill -9 in the middle, the same command again: the same weights, bit for bit."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from tests.support.command import OPD, SMALL, environment, opd

COMMAND = [
    "train", "quickstart", *SMALL, "train.steps=6", "save.every=2", "eval.every=3",
    "launch.processes=1", "zero=1", "optim.weight_decay=0.1", "rollout.n=2",
    "record=weights", "record.every=2",
]  # fmt: skip


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_after(home: Path, steps: int) -> None:
    """Start the run, and kill the launcher alone, without warning, once ``steps`` are logged."""
    process = subprocess.Popen(
        [*OPD, *COMMAND, "run.dir=killed"],
        cwd=home,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family = []
    deadline = time.monotonic() + 1200
    while lines(home / "killed" / "metrics.jsonl") < 1 + steps:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(family, timeout=300)
    assert not alive, f"processes outlived their launcher: {alive}"
    assert gone


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = opd(*COMMAND, "run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    kill_after(tmp_path, steps=3)
    assert not (tmp_path / "killed" / "final").exists()
    again = opd(*COMMAND, "run.dir=killed", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "starting from step 2" in again.stdout or "starting from step 4" in again.stdout
    expected = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    found = load_file(tmp_path / "killed" / "final" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert lines(tmp_path / "killed" / "metrics.jsonl") == 7
    recorded = [(tmp_path / run / "weights.jsonl").read_text() for run in ("whole", "killed")]
    assert recorded[0] == recorded[1]
    assert recorded[0].count("\n") == 4
