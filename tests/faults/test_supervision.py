"""What is stopped, hangs, dies or leaves early is noticed, named, and started again where that is asked."""

import os
import signal
import time
from pathlib import Path

import pytest

from opd.heartbeat import read_beat
from opd.phases import RunPhase
from tests.support.disturbed import DisturbedRun


def test_a_stopped_rank_is_restarted_then_named_and_the_run_goes_on_to_the_same_bits(
    home: Path, whole: Path
) -> None:
    deadlines = [
        f"launch.deadlines.{phase}=20" for phase in ("rollout", "teacher", "learn", "sync")
    ]
    run = DisturbedRun(home, "stopped", "launch.restarts=1", "save.every=1", *deadlines)
    first = run.wait_for(RunPhase.rollout, 3)
    run.signal("rank", signal.SIGSTOP)
    run.ignore(first)
    run.wait_for(RunPhase.learn, 3)
    assert "opd: restart 1 of 1: the run goes on from the checkpoint of step" in run.read_errors()
    run.signal("rank", signal.SIGSTOP)
    assert run.wait() == 1
    errors = run.read_errors()
    last = errors.splitlines()[-1]
    assert last.startswith("opd: rank 0 on ")
    assert " is stopped or hangs: in phase " in last
    assert "=20)" in last
    assert "Traceback" not in errors
    run.start()
    assert run.wait() == 0, run.read_errors()
    run.require_same(whole)


def test_a_teacher_that_is_stopped_is_started_again_and_its_scores_are_the_same(
    home: Path, whole: Path
) -> None:
    run = DisturbedRun(home, "teacher", "launch.deadlines.server=15")
    run.wait_for(RunPhase.learn, 2)
    run.signal("teacher", signal.SIGSTOP)
    assert run.wait() == 0, run.read_errors()
    (sentence,) = run.read_errors().splitlines()
    assert sentence.startswith("opd: the teacher server gave no sign of life for 15 s")
    assert sentence.endswith("it is started again (1 of 2 restarts)")
    run.require_same(whole)


def test_a_teacher_without_restarts_ends_the_run_in_one_sentence(home: Path) -> None:
    run = DisturbedRun(home, "lost", "teacher.restarts=0", "train.steps=400")
    run.wait_for(RunPhase.learn, 1)
    run.signal("teacher", signal.SIGKILL)
    assert run.wait() == 1
    (sentence,) = [s for s in run.read_errors().splitlines() if s.startswith("opd: ")]
    assert sentence.startswith("opd: the teacher server was ended by signal 9, after 0 restarts")
    assert "Traceback" not in run.read_errors()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_ranks_the_stopped_one_is_named_within_its_deadline(home: Path, rank: int) -> None:
    deadlines = [
        f"launch.deadlines.{phase}=40" for phase in ("rollout", "teacher", "learn", "sync")
    ]
    two = ["launch.engine=deepspeed", "launch.processes=2"]
    run = DisturbedRun(home, f"two_{rank}", *two, "train.steps=400", *deadlines)
    run.wait_for(RunPhase.learn, 3)
    beat = read_beat(run.folder, rank)
    assert beat is not None
    os.kill(beat.pid, signal.SIGSTOP)
    before = time.monotonic()
    assert run.wait() == 1
    seconds = time.monotonic() - before
    last = run.read_errors().splitlines()[-1]
    assert last.startswith(f"opd: rank {rank} on "), last
    assert " is stopped or hangs: in phase " in last
    assert " and rank " not in last
    print(f"noticed and ended after {seconds:.1f} s of a deadline of 40 s")
    run.require_nothing_left()
