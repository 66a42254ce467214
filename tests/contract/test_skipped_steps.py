"""A step whose loss or gradient norm is not finite moves no bit, in any engine, dense and masked."""

import math

import pytest
import torch

from opd.config.train import OnNonfinite
from opd.faults import RunError
from opd.train.finite import MOST_SKIPPED, SkippedSteps
from opd.world import World
from tests.support.launch import run_ranks
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
ALONE = [
    "dense/torch/fp32/adamw/1.0/4",
    "compact/torch/bf16/sgd/0/4",
    "restore/torch/fp32/adamw/0/4",
]
SHARDED = [
    *(f"dense/{zero}/bf16/adamw/1.0/4" for zero in range(4)),
    *(f"compact/{zero}/fp32/adamw/0/4" for zero in (0, 1, 3)),
    "restore/2/fp32/sgd/1.0/4",
]
FAULTS = ("loss", "norm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("skipped"))
    for ranks, cases in ((1, ALONE), (2, SHARDED)):
        names = [f"{case}/{fault}" for case in cases for fault in (*FAULTS, "absent")]
        run_ranks(results, ranks, "skips", names)
    return results


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("case", [*ALONE, *SHARDED])
def test_a_skipped_step_moves_no_bit(trained: Results, case: str, fault: str) -> None:
    found, expected = trained.weights(f"{case}/{fault}"), trained.weights(f"{case}/absent")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    before, skipped, *after = trained.reports(f"{case}/{fault}")
    assert [r["optim/skipped_steps"] for r in (before, skipped, *after)] == [0.0, 1.0, 1.0, 1.0]
    assert all(math.isfinite(value) for value in skipped.values())
    assert "optim/grad_norm" not in skipped


def test_ten_skipped_steps_in_a_row_end_the_run() -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    skipped = SkippedSteps(OnNonfinite.skip, world)
    for step in range(1, MOST_SKIPPED):
        skipped.take(step, "the loss is nan")
    skipped.take(MOST_SKIPPED, None)
    for step in range(1, MOST_SKIPPED):
        skipped.take(step, "the loss is nan")
    resumed = SkippedSteps(OnNonfinite.skip, world)
    resumed.load(skipped.state())
    assert resumed.metrics() == {"optim/skipped_steps": 18.0}
    with pytest.raises(RunError, match=r"step 20: the loss is nan, as in each of the 10 steps"):
        resumed.take(20, "the loss is nan")
    with pytest.raises(RunError, match="step 1: the loss is nan; nothing of this step"):
        SkippedSteps(OnNonfinite.stop, world).take(1, "the loss is nan")
