"""``rollout=server`` end to end: the run that vLLM inside each rank makes, bit for bit."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.support.command import OPD, SMALL, environment, opd

COMMAND = [
    "train", "quickstart", *SMALL, "train.steps=4", "save.every=2", "eval.every=2",
    "launch.processes=2", "sync.verify_every=1",
]  # fmt: skip
SERVED = [*COMMAND, "rollout=server", "rollout.servers=2"]  # as many as ranks: the same batches
ELSEWHERE = ("time/", "sync/")


def rows(run: Path) -> list[dict[str, float]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_after(home: Path, steps: int) -> None:
    """Start the run, and kill the launcher alone, without warning, once ``steps`` are logged."""
    process = subprocess.Popen(
        [*OPD, *SERVED, "run.dir=served"],
        cwd=home,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 1200
    while len(rows(home / "served")) < 1 + steps:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 5, "a teacher, two rollout servers and two ranks"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=300)
    assert not alive, f"processes outlived their launcher: {alive}"


@pytest.mark.slow
def test_a_served_run_killed_and_resumed_is_the_run_without_servers(tmp_path: Path) -> None:
    whole = opd(*COMMAND, "run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    kill_after(tmp_path, steps=3)
    again = opd(*SERVED, "run.dir=served", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "starting from step 2" in again.stdout or "starting from step 4" in again.stdout
    expected, found = rows(tmp_path / "whole"), rows(tmp_path / "served")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    for a, b in zip(expected, found, strict=True):
        numbers = {k: v for k, v in b.items() if not k.startswith(ELSEWHERE)}
        assert numbers == {k: v for k, v in a.items() if not k.startswith(ELSEWHERE)}
        assert {"sync/bytes", "sync/changed", "sync/snapshots", "sync/gap"} <= b.keys()
        assert b["sync/snapshots"] == float(b["step"] == 0)
    expected = load_file(tmp_path / "whole" / "final" / "model.safetensors")
    final = load_file(tmp_path / "served" / "final" / "model.safetensors")
    assert final.keys() == expected.keys()
    for name in expected:
        assert torch.equal(final[name], expected[name]), name


def test_a_server_that_is_not_there_is_said_before_anything_starts(tmp_path: Path) -> None:
    done = opd(
        "train", "quickstart", "rollout=server", "rollout.urls=[http://127.0.0.1:9]", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "the rollout server at http://127.0.0.1:9 failed" in done.stderr
    assert "opd rollout model=" in done.stderr


def test_the_rollout_command_lists_its_keys(tmp_path: Path) -> None:
    done = opd("rollout", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "max_model_len=" in done.stdout
    assert "Longest prompt plus completion" in done.stdout
