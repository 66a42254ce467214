"""A mask confines training bit for bit, at every stage, on one rank and on two."""

from pathlib import Path

import pytest
import torch

from opd.train.weights import named_weights
from opd.world import World
from tests.support.cases import mask_case
from tests.support.launch import run_ranks
from tests.support.learners import (
    EMPTY,
    FULL,
    TINY_VOCAB,
    build_learner,
    fixed_scores,
    tiny_mask,
    tiny_model,
)
from tests.support.results import Results

pytestmark = pytest.mark.timeout(600, func_only=True)  # ranks are watched while they train
LONG = [
    f"compact/{zero}/fp32/{optimizer}/1.0/200"
    for zero in range(4)
    for optimizer in ("adamw", "sgd")
]
LONG_ROUNDED = ["compact/1/bf16/adamw/1.0/200", "compact/3/bf16/sgd/1.0/200"]
ALONE = ["torch/fp32/adamw/1.0/60", "torch/fp32/sgd/1.0/60", "torch/bf16/adamw/1.0/10"]
SHARDED = [
    f"{zero}/{precision}/{optimizer}/0/10"
    for zero in range(4)
    for precision in ("fp32", "bf16")
    for optimizer in ("adamw", "sgd")
]
SCORES = ["early_delta", "adam_saliency", "fisher"]
SCORED = [f"{score}/{zero}/fp32/adamw/0/3" for score in SCORES for zero in (1, 2, 3)]
SCORED_ALONE = [f"{score}/torch/fp32/adamw/0/3" for score in SCORES]
FIRST = ["first_gradient/torch/fp32/adamw/0/1", "fisher/torch/fp32/adamw/0/1"]
CLIPPED = [f"{zero}/fp32/adamw/1.0/2" for zero in range(4)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Results:
    results = Results(out=tmp_path_factory.mktemp("masked"))
    both = [f"{training}/{case}" for case in ALONE for training in ("compact", "restore")]
    alone = [f"compact/{ALONE[0]}/resumed", *SCORED_ALONE, *FIRST]
    run_ranks(results, 1, "masks", [*both, *alone])
    both = [
        f"{training}/{case}" for case in SHARDED + CLIPPED for training in ("compact", "restore")
    ]
    resumed = [f"{case}/resumed" for case in (LONG + LONG_ROUNDED)]
    run_ranks(results, 2, "masks", both)
    run_ranks(results, 2, "masks", [*LONG[:2], *resumed, *SCORED])
    return results


def kept() -> dict[str, torch.Tensor]:
    """The mask of the tiny model as dense booleans."""
    mask = tiny_mask(tiny_model())
    dense = {}
    for name, shape in mask.shapes.items():
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        flat[mask.indices[name].long()] = True
        dense[name] = flat.view(shape)
    return dense


def moved_where_kept(found: dict[str, torch.Tensor]) -> float:
    """The share of kept coordinates that moved; bits off the mask must be the base's."""
    base, mask = dict(named_weights(tiny_model())), kept()
    assert found.keys() == base.keys() == mask.keys()
    assert not mask[EMPTY].any()
    assert mask[FULL].all()
    moved = 0
    for name, weight in found.items():
        start = base[name].detach().to(weight.dtype)
        assert torch.equal(weight[~mask[name]], start[~mask[name]]), name
        moved += int((weight != start).sum())
    return moved / sum(int(m.sum()) for m in mask.values())


@pytest.mark.parametrize("case", [f"{c}/resumed" for c in LONG + LONG_ROUNDED])
def test_frozen_coordinates_are_the_base_s_bits_after_200_steps_and_a_resume(
    trained: Results, case: str
) -> None:
    assert moved_where_kept(trained.weights(case)) > (0.5 if "bf16" in case else 0.95)
    last = trained.reports(case)[-1]
    assert last["mask/density"] == pytest.approx(
        float(torch.cat([m.flatten() for m in kept().values()]).float().mean())
    )


@pytest.mark.parametrize("case", [*LONG[:2], f"compact/{ALONE[0]}"])
def test_a_resumed_masked_run_is_the_uninterrupted_one(trained: Results, case: str) -> None:
    whole, resumed = trained.weights(case), trained.weights(f"{case}/resumed")
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert trained.reports(case)[-1] == trained.reports(f"{case}/resumed")[-1]


@pytest.mark.parametrize("case", [*ALONE, *SHARDED])
def test_compact_training_is_the_dense_masked_reference_bit_for_bit(
    trained: Results, case: str
) -> None:
    compact, reference = trained.weights(f"compact/{case}"), trained.weights(f"restore/{case}")
    assert moved_where_kept(reference) > 0
    for name in reference:
        assert torch.equal(compact[name], reference[name]), name


@pytest.mark.parametrize("case", CLIPPED)
def test_clipping_on_shards_differs_from_the_reference_by_one_ulp_at_most(
    trained: Results, case: str
) -> None:
    compact, reference = trained.weights(f"compact/{case}"), trained.weights(f"restore/{case}")
    for name in reference:
        ulps = (compact[name].view(torch.int32) - reference[name].view(torch.int32)).abs()
        assert int(ulps.max()) <= 1, name


@pytest.mark.parametrize("case", [*ALONE, *CLIPPED])
def test_the_gradient_norm_counts_kept_coordinates_only(trained: Results, case: str) -> None:
    compact = [r["optim/grad_norm"] for r in trained.reports(f"compact/{case}")]
    reference = [r["optim/grad_norm"] for r in trained.reports(f"restore/{case}")]
    assert compact == pytest.approx(reference, rel=1e-6)


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    setup = mask_case("compact/torch/fp32/adamw/1.0/2").setup
    learner = build_learner(setup, world)
    learner.step(fixed_scores(0, TINY_VOCAB))
    learner.save(str(tmp_path))
    same = build_learner(setup, world)
    same.load(str(tmp_path))
    assert same.version == 1
    everything = build_learner(mask_case("dense/torch/fp32/adamw/1.0/2").setup, world)
    with pytest.raises(ValueError, match="was trained with another mask"):
        everything.load(str(tmp_path))


@pytest.mark.parametrize("case", SCORED)
def test_scores_do_not_depend_on_stage_or_ranks(trained: Results, case: str) -> None:
    score, _, rest = case.split("/", 2)
    found, expected = trained.weights(case), trained.weights(f"{score}/torch/{rest}")
    assert found.keys() == expected.keys() == dict(named_weights(tiny_model())).keys()
    for name in expected:
        assert found[name].shape == expected[name].shape
        # an Adam step turns rounding noise of near-zero gradients into a part of a step
        far = ~torch.isclose(found[name], expected[name], rtol=1e-3, atol=1e-6)
        assert far.float().mean() < 0.01, name


def test_the_first_gradient_is_the_root_of_one_step_s_squares(trained: Results) -> None:
    first, squares = (trained.weights(case) for case in FIRST)
    for name in first:
        torch.testing.assert_close(first[name] ** 2, squares[name])
    assert all((squares[name] > 0).any() for name in squares)


def test_early_delta_is_how_far_the_masters_went(trained: Results) -> None:
    found = trained.weights(SCORED_ALONE[0])
    # three warm-up and full AdamW steps at 3e-3 go 0.0075 at most, decay aside
    assert 0.005 < max(float(score.max()) for score in found.values()) < 0.0085
