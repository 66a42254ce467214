"""SIGTERM and SIGHUP: the step in progress is saved, nothing is left behind, and no step is lost."""

import json
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from opd.faults import RunError
from opd.run.stop import StopRequest
from tests.support.command import OPD, SMALL, environment, opd

COMMAND = [
    "train", "quickstart", *SMALL, "rollout=transformers", "teacher=local", "launch.engine=torch",
    "launch.processes=1", "train.steps=8", "save.every=0", "eval.every=0",
]  # fmt: skip


def test_the_first_signal_is_noted_while_a_step_is_finished_and_the_second_ends() -> None:
    stop = StopRequest()
    with stop.handle_signals():
        stop.finishes_step = True
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        assert stop.name == "SIGTERM"
        with pytest.raises(RunError, match="ended by SIGHUP"):
            signal.raise_signal(signal.SIGHUP)


def test_a_signal_ends_at_once_what_has_no_step_to_finish() -> None:
    stop = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RunError, match="ended by SIGTERM"), stop.handle_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_handles_no_signals() -> None:
    stop, errors = StopRequest(), []

    def run() -> None:
        try:
            with stop.handle_signals():
                pass
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == []


def steps(folder: Path) -> list[int]:
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line)["step"] for line in text.splitlines()]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_run_that_is_asked_to_end_saves_first_and_goes_on_to_the_same_bits(
    tmp_path: Path, name: str
) -> None:
    if name == "SIGTERM":
        assert opd(*COMMAND, "run.dir=whole", cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        [*OPD, *COMMAND, "run.dir=stopped"],
        cwd=tmp_path,
        env=environment() | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(steps(tmp_path / "stopped")) < 3:
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate()
    assert process.returncode == 1, errors
    assert f"{name}: the step in progress is finished and saved" in errors
    (sentence,) = [line for line in errors.splitlines() if line.startswith("opd: ")]
    assert "stopped after step" in sentence
    assert "Traceback" not in errors
    _, alive = psutil.wait_procs(family, timeout=300)
    assert not alive
    last = steps(tmp_path / "stopped")[-1]
    assert last < 8
    saved = [p.name for p in (tmp_path / "stopped" / "checkpoints").iterdir()]
    assert saved == [f"step_{last:06d}"]
    left = {p.name for p in tmp_path.iterdir()} - {"stopped", "whole"}
    # torch's compiler keeps its cache for later processes in the temporary folder
    assert not {name for name in left if not name.startswith("torchinductor_")}
    if name == "SIGHUP":
        return
    again = opd(*COMMAND, "run.dir=stopped", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"starting from step {last}" in again.stdout
    assert steps(tmp_path / "stopped") == list(range(9))
    whole, stopped = (
        load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "stopped")
    )
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)
