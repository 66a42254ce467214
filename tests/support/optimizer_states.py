"""One rank of a learner that takes two steps; each case leaves what became of its optimizer states.

    python -m tests.support.optimizer_states OUT CASE [CASE ...]

Cases are those of the kind "engines" of ``tests.support.cases``.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.learner import StudentLearner
from opd.world import World, join_world
from tests.support.cases import engine_case
from tests.support.ranks import fresh_learner
from tests.support.results import finish_case, partial_folder

STATES = "states.json"


def main(out: Path, cases: list[str]) -> None:
    """Run cases one after the other; collective."""
    world = join_world()
    for name in cases:
        left = run_case(name, world)
        if world.is_main:
            folder = partial_folder(out, name)
            folder.mkdir()
            (folder / STATES).write_text(json.dumps(left))
            finish_case(out, name)
        world.barrier()


def run_case(name: str, world: World) -> dict[str, Any]:
    """Values of states when built, after two steps, and of these in new memory; summed over ranks."""
    case = engine_case(name)
    learner = fresh_learner(case.setup, world, None)
    built = states(learner)
    for step in range(2):
        learner.step(case.batch(learner, step)[world.rank :: world.size])
    stepped = states(learner)
    new = {key: numel for key, numel in stepped.items() if key not in built}
    totals = {"built": built, "stepped": stepped, "new": new}
    return world.sum({key: float(sum(found.values())) for key, found in totals.items()})


def states(learner: StudentLearner) -> dict[tuple[int, str], int]:
    """(address, name) of each state tensor -> the number of its values."""
    engine: Any = learner._engine
    optimizer: torch.optim.Optimizer = (
        engine._engine.basic_optimizer if isinstance(engine, DeepSpeedEngine) else engine._optimizer
    )
    return {
        (tensor.data_ptr(), name): tensor.numel()
        for state in optimizer.state.values()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


if __name__ == "__main__":
    status = 0
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
