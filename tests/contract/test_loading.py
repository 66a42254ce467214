"""The learner's model is loaded in the trained dtype, in parts under ZeRO 3, and trains as a whole one."""

import pytest
import torch

from opd.train.weights import named_weights
from tests.support.launch import run_cases
from tests.support.learners import quickstart_student
from tests.support.loading import PEAK, quickstart_mask, save_model
from tests.support.results import Results

pytestmark = pytest.mark.timeout(900, func_only=True)  # ranks are watched while they train
SCRIPT = ["-m", "tests.support.loading"]
BUILDS = [
    *(f"{zero}/bf16/none/dense" for zero in range(4)),
    *(f"{zero}/bf16/lora/dense" for zero in (0, 2, 3)),
    *(f"{zero}/bf16/none/{training}" for zero in (1, 3) for training in ("compact", "restore")),
    "2/fp32/none/dense",
    "3/fp32/none/dense",
    "3/pure_bf16/none/dense",
]
MEMORY = ["memory/whole/3", "memory/recipe/3", "memory/recipe/2"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("loaded"))
    cases = [f"learner/{how}/{build}" for build in BUILDS for how in ("whole", "recipe")]
    run_cases(results, 2, SCRIPT, cases)
    return results


@pytest.mark.parametrize("build", BUILDS)
def test_a_run_is_the_one_of_a_model_loaded_whole_in_float32(loaded: Results, build: str) -> None:
    whole, found = f"learner/whole/{build}", f"learner/recipe/{build}"
    assert loaded.reports(found) == loaded.reports(whole)
    expected, weights = loaded.weights(whole), loaded.weights(found)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == tensor.dtype
        assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_stage_3_learns_what_stage_2_learns(loaded: Results, adapter: str) -> None:
    third, second = (f"learner/recipe/{zero}/bf16/{adapter}/dense" for zero in (3, 2))
    for found, expected in zip(loaded.reports(third), loaded.reports(second), strict=True):
        for name in ("loss/total", "loss/reverse_kl", "optim/grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-2), name


@pytest.mark.parametrize("training", ["compact", "restore"])
def test_weights_outside_a_mask_keep_their_bits(loaded: Results, training: str) -> None:
    mask = quickstart_mask()
    trained = loaded.weights(f"learner/recipe/3/bf16/none/{training}")
    start = {n: w.bfloat16() for n, w in named_weights(quickstart_student())}
    moved = 0
    for name, index in mask.indices.items():
        changed = trained[name].flatten() != start[name].flatten()
        moved += int(changed[index.long()].sum())
        changed[index.long()] = False
        assert not changed.any(), name
    assert moved


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """The peak bytes of a rank per parameter, the largest of two ranks, by case."""
    results = Results(out=tmp_path_factory.mktemp("memory"))
    parameters = save_model(results.out)
    with pytest.MonkeyPatch.context() as patch:
        # freed tensors go back to the system, so that what is counted is what is held
        patch.setenv("MALLOC_MMAP_THRESHOLD_", str(128 << 10))
        run_cases(results, 2, SCRIPT, MEMORY)
    return {
        case: max(results.json(case, f"{rank}.{PEAK}") for rank in range(2)) / parameters
        for case in MEMORY
    }


def test_no_rank_holds_a_whole_float32_model_while_it_loads(peaks: dict[str, float]) -> None:
    assert peaks["memory/whole/3"] > 4.0, "the measure sees a whole model in float32"
    assert peaks["memory/recipe/2"] < 4.0
    # half a model in bf16 is one byte a parameter; the rest is a layer in float32, for the checks
    assert peaks["memory/recipe/3"] < 2.0
