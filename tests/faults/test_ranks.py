"""Ranks that leave early, are killed, hang or explain themselves, as child processes without a model."""

import subprocess
import sys
from pathlib import Path

import pytest

from opd.config.launch import DeadlineConfig
from opd.run.commands import ChildCommand
from opd.run.hang import HangWatch
from opd.run.ranks import WorkerFailed, WorkerLost, _require_sound, started_ranks, wait_for_ranks

RANK = """
import faulthandler, os, signal, sys, time
from pathlib import Path
from opd.heartbeat import Heartbeat
from opd.phases import RunPhase
faulthandler.register(signal.SIGUSR1)
heartbeat = Heartbeat(Path({folder!r}), {rank})
def hang():
    time.sleep(600)
heartbeat.enter(RunPhase.learn, 7)
{code}
"""
DONE = "heartbeat.enter(RunPhase.done, 9); os._exit(0)"
WAIT = "time.sleep(600)"


def run(folder: Path, *codes: str, learn: float = 0.0) -> None:
    logs = folder / "logs"
    logs.mkdir()
    commands = [
        ChildCommand(
            arguments=("-c", RANK.format(folder=str(folder), rank=rank, code=code)), environment={}
        )
        for rank, code in enumerate(codes)
    ]
    with started_ranks(commands, {}, logs) as ranks:
        watch = HangWatch(folder, len(ranks), DeadlineConfig(learn=learn))
        wait_for_ranks(ranks, logs, watch, lambda: True)


def test_ranks_that_are_done_are_done(tmp_path: Path) -> None:
    run(tmp_path, DONE, f"time.sleep(1); {DONE}")
    assert not (tmp_path / "logs" / "beats").exists()


def test_a_rank_that_leaves_early_with_0_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match="process 1 left with status 0 in phase learn of step 7"):
        run(tmp_path, WAIT, "os._exit(0)")


def test_a_killed_rank_is_named_and_not_the_one_that_lost_its_connection(tmp_path: Path) -> None:
    for rank, words in enumerate(("RuntimeError: connection closed by peer\n", "")):
        (tmp_path / f"rank_{rank}.log").write_text(words)
    watch = HangWatch(tmp_path, 2, DeadlineConfig())
    with pytest.raises(WorkerLost, match="process 1 was ended by SIGKILL"):
        _require_sound([1, -9], tmp_path, watch)


def test_a_rank_s_own_words_are_preferred_and_such_a_run_is_not_restarted(tmp_path: Path) -> None:
    words = "print('opd: step 7: the loss is nan', file=sys.stderr); sys.exit(1)"
    with pytest.raises(WorkerFailed, match="step 7: the loss is nan") as error:
        run(tmp_path, WAIT, words)
    assert not isinstance(error.value, WorkerLost)


def test_a_rank_that_hangs_is_named_and_leaves_its_stack(tmp_path: Path) -> None:
    with pytest.raises(WorkerLost, match=r"rank 1 on \S+ hangs: in phase learn of step 7") as error:
        run(tmp_path, "heartbeat.enter(RunPhase.sync, 7); time.sleep(600)", "hang()", learn=4)
    assert "\n" not in str(error.value)
    assert "in hang" in (tmp_path / "logs" / "rank_1.log").read_text()


def test_ranks_of_another_launcher_watch_each_other(tmp_path: Path) -> None:
    code = RANK.format(
        folder=str(tmp_path),
        rank=0,
        code="from opd.config.launch import DeadlineConfig\nfrom opd.run.hang import leave_on_hang\n"
        f"leave_on_hang(Path({str(tmp_path)!r}), 0, 2, DeadlineConfig(start=3))\nhang()",
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("opd: rank 1 hangs: in phase start it finished nothing for ")
    assert "in hang" in done.stderr
