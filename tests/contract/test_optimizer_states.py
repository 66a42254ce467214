"""Optimizer states exist before the first step, so that it needs no more memory than every other."""

import pytest

from opd.train.weights import named_weights
from tests.support.launch import run_cases
from tests.support.learners import quickstart_student
from tests.support.optimizer_states import STATES
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
SCRIPT = ["-m", "tests.support.optimizer_states"]
ALONE = [f"torch/{p}/{o}/10000" for p in ("fp32", "bf16") for o in ("adamw", "sgd")]
SHARED = [
    *(f"{z}/{p}/{o}/40" for z in range(4) for p in ("fp32", "bf16") for o in ("adamw", "sgd")),
    "1/pure_bf16/sgd/40",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("states"))
    run_cases(results, 1, SCRIPT, ALONE)
    run_cases(results, 2, SCRIPT, SHARED)
    return results


@pytest.mark.parametrize("case", [*ALONE, *SHARED])
def test_a_step_allocates_no_optimizer_state(trained: Results, case: str) -> None:
    zero, _, optimizer, _ = case.split("/")
    found = trained.json(case, STATES)
    weights = sum(p.numel() for _, p in named_weights(quickstart_student()))
    copies = 2 if zero == "0" else 1  # both ranks hold everything in stage 0
    per_weight = 2 if optimizer == "adamw" else 1
    assert found["built"] >= weights * copies * per_weight
    assert found["built"] < 1.1 * weights * copies * per_weight  # counters and padding
    assert found["stepped"] == found["built"]
    assert found["new"] == 0


@pytest.mark.parametrize("case", [*ALONE, *SHARED])
def test_training_is_that_of_states_made_in_the_first_step(trained: Results, case: str) -> None:
    assert trained.json(case, STATES)["same"]


@pytest.mark.parametrize("case", [*ALONE, *SHARED])
def test_a_checkpoint_of_such_a_run_is_resumed_bit_for_bit(trained: Results, case: str) -> None:
    assert trained.json(case, STATES)["resumed"]
