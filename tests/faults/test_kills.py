"""SIGKILL of any process in any phase: the run goes on to the same bits, and nothing is left behind."""

import random
import time
from itertools import product
from pathlib import Path

import pytest

from opd.phases import RunPhase
from tests.support.disturbed import COMMAND, DisturbedRun

PHASES = (
    RunPhase.rollout, RunPhase.teacher, RunPhase.learn, RunPhase.sync, RunPhase.checkpoint,
)  # fmt: skip
RESTARTS = ("launch.restarts=100", "teacher.restarts=100", "save.every=1")
LONG = (*RESTARTS, "train.steps=50", "optim.schedule=constant")
SERVED = [
    "rollout=server" if word == "rollout=transformers" else word for word in COMMAND
] + ["rollout.restarts=100", "rollout.kv_cache_memory_bytes=33554432"]  # fmt: skip


def finish(run: DisturbedRun, whole: Path) -> None:
    assert run.wait() == 0, run.read_errors()
    run.require_same(whole)


def undisturbed(home: Path, name: str, *overrides: str, command: list[str] = COMMAND) -> Path:
    run = DisturbedRun(home, name, *overrides, command=command)
    assert run.wait() == 0, run.read_errors()
    run.require_nothing_left()
    return run.folder


def test_a_run_survives_kills_of_its_rank_its_teacher_and_its_launcher(
    home: Path, whole: Path
) -> None:
    run = DisturbedRun(home, "killed", *RESTARTS)
    run.kill("rank", RunPhase.start, 0)
    run.kill("rank", RunPhase.learn, 2)
    run.kill("teacher", RunPhase.teacher, 3)
    run.kill("launcher", RunPhase.checkpoint, 5)
    finish(run, whole)


@pytest.fixture(scope="module")
def long_run(home: Path) -> Path:
    return undisturbed(home, "long", *LONG)


def kill_points(draw: random.Random) -> list[tuple[str, RunPhase]]:
    """Every process in every phase, shuffled; kills at the start follow one after which a rank starts."""
    points = [*product(("launcher", "rank", "teacher"), PHASES)]
    draw.shuffle(points)
    killed = [point for point in points if point[0] != "teacher"]
    for who, point in zip(("launcher", "rank", "teacher"), killed, strict=False):
        points.insert(points.index(point) + 1, (who, RunPhase.start))
    return points


@pytest.mark.slow
def test_every_process_is_killed_in_every_phase(home: Path, long_run: Path) -> None:
    points = kill_points(random.Random(1))
    run, step = DisturbedRun(home, "points", *LONG), 0
    for number, (who, phase) in enumerate(points):
        step = run.kill(who, phase, 0 if phase == RunPhase.start else step + 1).step or step
        print(f"{number + 1} {who} {phase} step {step} {time.strftime('%X')}", flush=True)
    assert len(points) == 18
    finish(run, long_run)


@pytest.mark.slow
def test_a_run_with_a_rollout_server_survives_its_kills(home: Path) -> None:
    settings = (*RESTARTS, "train.steps=12", "optim.schedule=constant")
    whole = undisturbed(home, "served", *settings, command=SERVED)
    run, step = DisturbedRun(home, "served_killed", *settings, command=SERVED), 0
    points = [
        ("rollout", RunPhase.rollout),
        ("rollout", RunPhase.sync),
        ("rank", RunPhase.rollout),
        ("rollout", RunPhase.learn),
        ("launcher", RunPhase.sync),
        ("rollout", RunPhase.checkpoint),
    ]
    for number, (who, phase) in enumerate(points):
        step = run.kill(who, phase, step + 1).step
        print(f"{number + 1} {who} {phase} step {step} {time.strftime('%X')}", flush=True)
    finish(run, whole)


@pytest.mark.slow
def test_thirty_random_kills_in_one_run(home: Path, long_run: Path) -> None:
    draw = random.Random(7)
    run, step = DisturbedRun(home, "soak", *LONG), 0
    for number in range(30):
        who, phase = draw.choice(("launcher", "rank", "rank", "teacher")), draw.choice(PHASES)
        step = run.kill(who, phase, step + 1).step
        print(f"{number + 1} {who} {phase} step {step} {time.strftime('%X')}", flush=True)
    finish(run, long_run)
