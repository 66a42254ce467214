"""What is stopped, hangs, dies or leaves early is noticed, named, and started again where that is asked."""

import signal
from pathlib import Path

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


def test_a_teacher_that_dies_or_stops_is_started_again_and_the_scores_are_the_same(
    home: Path, whole: Path
) -> None:
    run = DisturbedRun(home, "teacher", "launch.deadlines.server=15", "teacher.restarts=2")
    run.wait_for(RunPhase.learn, 2)
    run.signal("teacher", signal.SIGKILL)
    run.wait_for(RunPhase.learn, 4)
    run.signal("teacher", signal.SIGSTOP)
    assert run.wait() == 0, run.read_errors()
    errors = run.read_errors()
    assert (
        "the teacher server was ended by signal 9: it is started again (1 of 2 restarts)" in errors
    )
    assert "gave no sign of life for 15 s: it is started again (2 of 2 restarts)" in errors
    run.require_same(whole)


def test_a_teacher_without_restarts_ends_the_run_in_one_sentence(home: Path) -> None:
    run = DisturbedRun(home, "lost", "teacher.restarts=0", "train.steps=400")
    run.wait_for(RunPhase.learn, 1)
    run.signal("teacher", signal.SIGKILL)
    assert run.wait() == 1
    (sentence,) = [s for s in run.read_errors().splitlines() if s.startswith("opd: ")]
    assert sentence.startswith("opd: the teacher server was ended by signal 9, after 0 restarts")
    assert "Traceback" not in run.read_errors()
