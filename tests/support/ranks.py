"""One rank of a learner on fixed scores; each case leaves weights, reports of its steps, a record.

    python -m tests.support.ranks KIND OUT CASE [CASE ...]

``tests.support.cases`` says what kinds and cases there are, ``tests.support.results`` what they leave.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from opd.config.train import MaskScores
from opd.train.learner import StudentLearner
from opd.train.record import Write
from opd.world import World, join_world
from tests.support.cases import KINDS, Case
from tests.support.learners import Setup, build_learner, initial_weights
from tests.support.results import (
    REPORTS,
    ROWS,
    WEIGHTS,
    case_folder,
    finish_case,
    partial_folder,
)


def main(kind: str, out: Path, cases: list[str]) -> None:
    """Run cases one after the other; collective."""
    world = join_world()
    for name in cases:
        folder = partial_folder(out, name)
        if world.is_main:
            folder.mkdir()
        world.barrier()
        run_case(KINDS[kind](name), folder, world)
        world.barrier()
        if world.is_main:
            finish_case(out, name)


def run_case(case: Case, folder: Path, world: World) -> None:
    """Train, and write what the case leaves; on one rank a record brings a checkpoint of each step."""
    rows: list[dict[str, Any]] = []

    def write(step: int, row: Any) -> None:
        rows.append({"step": step, "row": row})

    setup, recorder = case.setup, write if case.records else None
    learner = fresh_learner(setup, world, recorder)
    reports = []
    if case.goes_on is not None:
        learner.load(str(case_folder(folder.parent, case.goes_on) / "checkpoint"))
        saved_learner(learner, world, folder / "checkpoint")
    for step in range(learner.version, setup.steps):
        if step == case.resume_at:
            learner = resumed_learner(learner, setup, world, recorder, folder / "checkpoint")
        share = case.batch(learner, step)[world.rank :: world.size]
        if not share:
            learner.version += 1
            continue
        reports.append(learner.step(share).metrics)
        if case.records and world.size == 1:
            saved_learner(learner, world, folder / f"step_{step + 1}")
    watched = setup.scores != MaskScores.none
    tensors = learner.scores(setup.scores, initial_weights(setup)) if watched else learner.weights()
    left = {name: tensor.clone() for name, tensor in tensors}
    if world.is_main:
        save_file(left, folder / WEIGHTS)
        (folder / REPORTS).write_text(json.dumps(reports))
        (folder / ROWS).write_text(json.dumps(rows))


def fresh_learner(setup: Setup, world: World, write: Write | None) -> StudentLearner:
    """accelerate's state belongs to one engine: the former one's is dropped."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return build_learner(setup, world, write)


def saved_learner(learner: StudentLearner, world: World, folder: Path) -> None:
    if world.is_main:
        folder.mkdir()
    world.barrier()
    learner.save(str(folder))
    world.barrier()


def resumed_learner(
    learner: StudentLearner, setup: Setup, world: World, write: Write | None, folder: Path
) -> StudentLearner:
    """A fresh learner that loads what this one saves."""
    saved_learner(learner, world, folder)
    fresh = fresh_learner(setup, world, write)
    fresh.load(str(folder))
    assert fresh.version == learner.version
    return fresh


if __name__ == "__main__":
    status = 0
    try:
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
    except BaseException:
        traceback.print_exc()
        status = 1
    # at once, as a worker of a run leaves: after gloo an interpreter may abort at its exit
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
