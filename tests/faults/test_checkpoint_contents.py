"""What a checkpoint holds of each rank, and that nothing else decides how a run goes on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.config.mask import MaskTraining
from opd.config.optim import AdamWConfig
from opd.config.train import Precision
from opd.data.stream import ShuffledPrompts
from opd.rollout.seeds import request_seed
from opd.sync.ema import FILE as MOVING_AVERAGE
from opd.sync.ema import EMAWeights
from opd.train.learner import StudentLearner
from opd.train.saved_states import random_states, read_rank_state
from opd.types import Prompt, Sampling
from opd.world import World
from tests.support.learners import TINY_VOCAB, Setup, build_learner, fixed_scores, tiny_model

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
SETUP = Setup(
    model=tiny_model,
    zero=None,
    precision=Precision.fp32,
    optim=AdamWConfig(lr=1e-3),
    steps=3,
    max_tokens=40,
    mask=MaskTraining.compact,
)


def trained(steps: int) -> StudentLearner:
    learner = build_learner(SETUP, ALONE, lambda step, row: None)
    for step in range(steps):
        learner.step(fixed_scores(step, TINY_VOCAB))
    return learner


def test_a_checkpoint_holds_the_state_of_every_part(tmp_path: Path) -> None:
    learner = trained(2)
    torch.manual_seed(5)
    learner.save(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank_0.pt", "torch.pt"]
    rank = torch.load(tmp_path / "rank_0.pt", weights_only=True)
    assert rank.keys() == {"version", "random", "mask", "record", "skipped", "layout"}
    assert rank["version"] == 2
    assert rank["mask"] == learner._parameter_mask.mask != ""
    assert rank["record"]["ever"].keys() == dict(learner.weights()).keys()
    assert rank["layout"] == {"engine": "torch"}
    state = torch.load(tmp_path / "torch.pt", weights_only=True)
    assert state.keys() == {"student", "optimizer"}
    assert {tuple(s) for s in state["optimizer"]["state"].values()} == {
        ("step", "exp_avg", "exp_avg_sq")
    }
    drawn = torch.rand(3)
    torch.manual_seed(6)
    trained(0).load(str(tmp_path))
    assert torch.equal(torch.rand(3), drawn), "dropout goes on with the same numbers"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_another_number_of_ranks_shares_what_each_rank_saved(tmp_path: Path, size: int) -> None:
    for rank, (ever, top) in enumerate([("a", 1.0), ("b", 2.0)]):
        record = {"ever": {ever: torch.ones(2)}, "tops": {10: {ever: torch.full((1,), top)}}}
        state = {"version": 10, "random": random_states(ALONE.device), "record": record}
        torch.save(state, tmp_path / f"rank_{rank}.pt")
    world = World(rank=size - 1, size=size, local_rank=0, device=ALONE.device)
    found = read_rank_state(str(tmp_path), world)
    assert found["version"] == 10
    assert ("random" in found) == (size == 2), "states of two ranks would be drawn from thrice"
    assert set(found["record"]["ever"]) == ({"b"} if size == 2 else {"a", "b"})
    assert set(found["record"]["tops"][10]) == ({"b"} if size == 2 else {"a", "b"})


def test_what_is_not_in_a_checkpoint_is_a_function_of_seed_step_and_prompt() -> None:
    prompts = [
        Prompt(uid=str(n), token_ids=np.ones(1, np.int32), teacher="maths" if n % 2 else "code")
        for n in range(50)
    ]
    whole, resumed = (ShuffledPrompts(prompts, 8, seed=3) for _ in range(2))
    taken = [whole.take(step) for step in range(9)]
    assert resumed.take(8) == taken[8], "order of the data, and who scores each prompt"
    ranks = [ShuffledPrompts(prompts, 8, 3, rank=r, size=3).take(8) for r in range(3)]
    shared = {p.uid for share in ranks for p in share}
    assert shared == {p.uid for p in taken[8]}, "with any number of ranks"
    seeds = {request_seed(p, Sampling(seed=step)) for p in prompts for step in range(3)}
    assert len(seeds) == 150, "the engine's draws"


def test_a_moving_average_is_in_the_checkpoint(tmp_path: Path) -> None:
    weights = {"w": torch.arange(3.0)}
    average = EMAWeights(weights, decay=0.9, moved=lambda: None)
    list(average.averaging([("w", torch.ones(3))], 1))
    average.save(str(tmp_path))
    assert (tmp_path / MOVING_AVERAGE).is_file()
    again = {"w": torch.zeros(3)}
    EMAWeights(again, decay=0.9, moved=lambda: None).load(str(tmp_path), 1)
    assert torch.equal(again["w"], weights["w"])


def test_states_of_a_run_that_trains_other_weights_are_refused(tmp_path: Path) -> None:
    trained(1).save(str(tmp_path))
    other = build_learner(replace(SETUP, mask=None), ALONE, lambda step, row: None)
    with pytest.raises(ValueError, match="was trained with another mask"):
        other.load(str(tmp_path))
