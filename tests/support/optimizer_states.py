"""One rank of a learner that takes three steps; each case leaves what became of its optimizer states.

    python -m tests.support.optimizer_states OUT CASE [CASE ...]

Cases are those of the kind "engines" of ``tests.support.cases``.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.train import deepspeed_engine, torch_engine
from opd.train.deepspeed_engine import DeepSpeedEngine
from opd.train.learner import StudentLearner
from opd.world import World, join_world
from tests.support.cases import Case, engine_case
from tests.support.ranks import fresh_learner, saved_learner
from tests.support.results import finish_case, partial_folder

STATES = "states.json"


def main(out: Path, cases: list[str]) -> None:
    """Run cases one after the other; collective."""
    world = join_world()
    for name in cases:
        folder = partial_folder(out, name)
        if world.is_main:
            folder.mkdir()
        world.barrier()
        left = run_case(name, world, folder / "checkpoint")
        if world.is_main:
            (folder / STATES).write_text(json.dumps(left))
            finish_case(out, name)
        world.barrier()


def run_case(name: str, world: World, checkpoint: Path) -> dict[str, Any]:
    """Values of states when built, after two steps, and of these in new memory; summed over ranks.

    ``same`` and ``resumed``: whether weights after three steps are those of a learner whose states torch
    creates in the first step, and of one that loads what such a learner saved after two.
    """
    case = engine_case(name)
    learner = fresh_learner(case.setup, world, None)
    built = states(learner)
    train(learner, case, world, range(2))
    stepped = states(learner)
    train(learner, case, world, [2])
    new = {key: numel for key, numel in stepped.items() if key not in built}
    totals = {"built": built, "stepped": stepped, "new": new}
    found = weights(learner)
    with pytest.MonkeyPatch.context() as patch:
        for engine in (torch_engine, deepspeed_engine):
            patch.setattr(engine, "create_states", lambda optimizer, parameters: None)
        learner = fresh_learner(case.setup, world, None)
    assert not states(learner)
    train(learner, case, world, range(2))
    saved_learner(learner, world, checkpoint)
    train(learner, case, world, [2])
    lazy = weights(learner)
    learner = fresh_learner(case.setup, world, None)
    learner.load(str(checkpoint))
    train(learner, case, world, [2])
    resumed = weights(learner)
    return {
        **world.sum({key: float(sum(each.values())) for key, each in totals.items()}),
        "same": all(torch.equal(found[n], lazy[n]) for n in lazy),
        "resumed": all(torch.equal(resumed[n], lazy[n]) for n in lazy),
    }


def train(learner: StudentLearner, case: Case, world: World, steps: Iterable[int]) -> None:
    for step in steps:
        learner.step(case.batch(learner, step)[world.rank :: world.size])


def weights(learner: StudentLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


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
