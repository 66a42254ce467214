"""DeepSpeed on 2 ranks, at every stage, learns what one plain process learns."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import run_ranks
from tests.support.learners import QUICKSTART
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
REFERENCE = {"adamw": "torch/fp32/adamw/10000", "sgd": "torch/fp32/sgd/10000"}
EXACT = [
    f"{zero}/fp32/{optimizer}/{micro}"
    for zero in range(4)
    for optimizer, micro in (("adamw", 40), ("sgd", 10000))
]
CUTS = ["torch/fp32/adamw/17", "torch/fp32/adamw/40", "torch/fp32/sgd/40"]
ROUNDED = [f"{zero}/bf16/adamw/40" for zero in range(4)]
PURE = ["1/pure_bf16/sgd/40"]
RESUMED = [*(f"{zero}/fp32/adamw/40" for zero in range(4)), *ROUNDED, "1/pure_bf16/sgd/40"]
RESUMED_ALONE = [REFERENCE["sgd"], "torch/bf16/adamw/40"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("trained"))
    alone = [*REFERENCE.values(), *CUTS, "torch/bf16/adamw/40"]
    run_ranks(results, 1, "engines", [*alone, *(f"{case}/resumed" for case in RESUMED_ALONE)])
    resumed = [f"{case}/resumed" for case in RESUMED]
    run_ranks(results, 2, "engines", [*EXACT, *ROUNDED, *PURE, *resumed])
    return results


def weights(trained: Results, case: str) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in trained.weights(case).items()}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - expected[n]).abs().max()) for n in expected)


@pytest.mark.parametrize("case", [*EXACT, *CUTS])
def test_weights_do_not_depend_on_stage_ranks_or_cuts(trained: Results, case: str) -> None:
    reference = weights(trained, REFERENCE[case.split("/")[2]])
    # AdamW turns rounding noise of near-zero gradients into steps of up to lr
    bound = 1e-5 if "sgd" in case else 1e-3
    found = weights(trained, case)
    assert distance(found, reference) < bound
    moved = sum(float((found[n] - reference[n]).abs().sum()) for n in found)
    assert moved / sum(w.numel() for w in found.values()) < 1e-6


@pytest.mark.parametrize("case", [*EXACT, *CUTS])
def test_metrics_do_not_depend_on_stage_ranks_or_cuts(trained: Results, case: str) -> None:
    expected = trained.reports(REFERENCE[case.split("/")[2]])
    for found, reference in zip(trained.reports(case), expected, strict=True):
        assert found.keys() == reference.keys()
        for name in ("loss/total", "loss/reverse_kl", "optim/grad_norm", "optim/lr"):
            assert found[name] == pytest.approx(reference[name], rel=2e-4), name


@pytest.mark.parametrize("case", [*ROUNDED, "torch/bf16/adamw/40"])
def test_bf16_with_masters_walks_as_far_as_fp32_and_in_its_direction(
    trained: Results, case: str
) -> None:
    exact, found = weights(trained, REFERENCE["adamw"]), weights(trained, case)
    start = load_file(QUICKSTART / "model.safetensors")
    matrices = [name for name in found if found[name].ndim > 1]
    walked = torch.cat([(found[n] - start[n].float()).flatten() for n in matrices])
    expected = torch.cat([(exact[n] - start[n].float()).flatten() for n in matrices])
    # Adam makes whole steps of rounded gradients, so directions agree on the whole, not each
    assert float(torch.cosine_similarity(walked, expected, dim=0)) > 0.8
    # an Adam counter that starts at 1 instead of 0 makes this 0.85
    assert float(walked.abs().sum() / expected.abs().sum()) == pytest.approx(1.0, abs=0.03)


def test_pure_bf16_trains_only_when_asked_and_loses_small_updates(trained: Results) -> None:
    found, exact = weights(trained, PURE[0]), weights(trained, REFERENCE["sgd"])
    for tensor in found.values():
        assert torch.equal(tensor, tensor.bfloat16().float())
    assert distance(found, exact) > 1e-4


@pytest.mark.parametrize("case", [*RESUMED, *RESUMED_ALONE])
def test_a_learner_that_was_saved_and_loaded_goes_on_bit_for_bit(
    trained: Results, case: str
) -> None:
    expected, found = weights(trained, case), weights(trained, f"{case}/resumed")
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert trained.reports(f"{case}/resumed")[-1] == trained.reports(case)[-1]
