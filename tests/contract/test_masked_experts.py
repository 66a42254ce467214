"""Experts, fused in memory, are trained at every stage, and a mask of their files confines them exactly."""

from contextlib import nullcontext

import pytest
import torch

from opd.train.weights import full_weights
from tests.support.launch import run_ranks
from tests.support.learners import tiny_experts, tiny_mask
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
ALONE = "torch/fp32/adamw/0/4"
SHARDED = [f"{zero}/fp32/adamw/0/4" for zero in range(4)]
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("experts"))
    run_ranks(results, 1, "experts", [f"{kind}/{ALONE}" for kind in KINDS])
    run_ranks(results, 2, "experts", [f"{kind}/{case}" for case in SHARDED for kind in KINDS])
    return results


KINDS = ("dense", "compact", "restore")


def base() -> dict[str, torch.Tensor]:
    return dict(full_weights(tiny_experts(), lambda parameters: nullcontext()))


@pytest.mark.parametrize("case", [ALONE, *SHARDED])
def test_compact_training_of_experts_is_the_dense_masked_reference(
    trained: Results, case: str
) -> None:
    compact, reference = trained.weights(f"compact/{case}"), trained.weights(f"restore/{case}")
    assert EXPERT in reference
    assert compact.keys() == reference.keys()
    for name in reference:
        assert torch.equal(compact[name], reference[name]), name


@pytest.mark.parametrize("case", [ALONE, *SHARDED])
@pytest.mark.parametrize("training", ["compact", "restore"])
def test_frozen_coordinates_of_experts_never_move(
    trained: Results, training: str, case: str
) -> None:
    start, mask = base(), tiny_mask(tiny_experts())
    found = trained.weights(f"{training}/{case}")
    assert found.keys() == start.keys() == mask.indices.keys()
    moved_experts = 0
    for name, weight in found.items():
        moved = (weight != start[name]).flatten()
        index = mask.indices[name].long()
        moved_experts += int(moved[index].sum()) if ".experts." in name else 0
        moved[index] = False
        assert not moved.any(), name
    assert moved_experts > 100


@pytest.mark.parametrize("case", SHARDED)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_on_two_ranks_are_those_of_one(trained: Results, kind: str, case: str) -> None:
    found, alone = trained.weights(f"{kind}/{case}"), trained.weights(f"{kind}/{ALONE}")
    assert found.keys() == alone.keys()
    far = sum(int((~torch.isclose(found[n], alone[n], rtol=1e-3, atol=1e-6)).sum()) for n in alone)
    # an Adam step turns rounding noise of near-zero gradients into a part of a step
    assert far < 0.01 * sum(t.numel() for t in alone.values())


@pytest.mark.parametrize("case", [ALONE, *SHARDED])
def test_every_step_reports_how_evenly_experts_are_loaded(trained: Results, case: str) -> None:
    alone, reports = trained.reports(f"dense/{ALONE}"), trained.reports(f"dense/{case}")
    assert len(reports) == 4
    for one, other in zip(alone, reports, strict=True):
        assert 1.0 <= one["router/max_load"] <= 4.0
        for name in ("router/max_load", "router/min_load", "router/entropy"):
            assert other[name] == pytest.approx(one[name], rel=0.02)
