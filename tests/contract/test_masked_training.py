"""A mask confines training bit for bit, at every stage, on one rank and on two."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parent))
from mask_ranks import EMPTY, FULL, VOCAB, learner_of, mask_of, tiny
from train_ranks import scores

from opd.train.weights import named_weights
from opd.world import World

pytestmark = pytest.mark.timeout(1800)  # the fixture trains every case
SCRIPT = str(Path(__file__).parent / "mask_ranks.py")
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
WATCHED = [f"{score}/{zero}/fp32/adamw/0/3" for score in SCORES for zero in (1, 2, 3)]
WATCHED_ALONE = [f"{score}/torch/fp32/adamw/0/3" for score in SCORES]
FIRST = ["first_gradient/torch/fp32/adamw/0/1", "fisher/torch/fp32/adamw/0/1"]
CLIPPED = [f"{zero}/fp32/adamw/1.0/2" for zero in range(4)]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[[int, list[str]], None]
) -> Path:
    out = tmp_path_factory.mktemp("masked")
    both = [f"{training}/{case}" for case in ALONE for training in ("compact", "restore")]
    alone = [f"compact/{ALONE[0]}/resumed", *WATCHED_ALONE, *FIRST]
    run_ranks(1, [SCRIPT, str(out), *both, *alone])
    both = [
        f"{training}/{case}" for case in SHARDED + CLIPPED for training in ("compact", "restore")
    ]
    resumed = [f"{case}/resumed" for case in (LONG + LONG_ROUNDED)]
    run_ranks(2, [SCRIPT, str(out), *both])
    run_ranks(2, [SCRIPT, str(out), *LONG[:2], *resumed, *WATCHED])
    return out


def weights(folder: Path, case: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case.replace('/', '_')}.safetensors")


def reports(folder: Path, case: str) -> list[dict[str, float]]:
    return json.loads((folder / f"{case.replace('/', '_')}.json").read_text())


def kept() -> dict[str, torch.Tensor]:
    """The mask of mask_ranks.py as dense booleans."""
    mask = mask_of(tiny())
    dense = {}
    for name, shape in mask.shapes.items():
        flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.bool)
        flat[mask.indices[name].long()] = True
        dense[name] = flat.view(shape)
    return dense


def moved_where_kept(found: dict[str, torch.Tensor]) -> float:
    """The share of kept coordinates that moved; bits off the mask must be the base's."""
    base, mask = dict(named_weights(tiny())), kept()
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
    trained: Path, case: str
) -> None:
    assert moved_where_kept(weights(trained, case)) > (0.5 if "bf16" in case else 0.95)
    last = reports(trained, case)[-1]
    assert last["mask/density"] == pytest.approx(
        float(torch.cat([m.flatten() for m in kept().values()]).float().mean())
    )


@pytest.mark.parametrize("case", [*LONG[:2], f"compact/{ALONE[0]}"])
def test_a_resumed_masked_run_is_the_uninterrupted_one(trained: Path, case: str) -> None:
    whole, resumed = weights(trained, case), weights(trained, f"{case}/resumed")
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name
    assert reports(trained, case)[-1] == reports(trained, f"{case}/resumed")[-1]


@pytest.mark.parametrize("case", [*ALONE, *SHARDED])
def test_compact_training_is_the_dense_masked_reference_bit_for_bit(
    trained: Path, case: str
) -> None:
    compact, reference = weights(trained, f"compact/{case}"), weights(trained, f"restore/{case}")
    assert moved_where_kept(reference) > 0
    for name in reference:
        assert torch.equal(compact[name], reference[name]), name


@pytest.mark.parametrize("case", CLIPPED)
def test_clipping_on_shards_differs_from_the_reference_by_one_ulp_at_most(
    trained: Path, case: str
) -> None:
    compact, reference = weights(trained, f"compact/{case}"), weights(trained, f"restore/{case}")
    for name in reference:
        ulps = (compact[name].view(torch.int32) - reference[name].view(torch.int32)).abs()
        assert int(ulps.max()) <= 1, name


@pytest.mark.parametrize("case", [*ALONE, *CLIPPED])
def test_the_gradient_norm_counts_kept_coordinates_only(trained: Path, case: str) -> None:
    compact = [r["optim/grad_norm"] for r in reports(trained, f"compact/{case}")]
    reference = [r["optim/grad_norm"] for r in reports(trained, f"restore/{case}")]
    assert compact == pytest.approx(reference, rel=1e-6)


def test_a_checkpoint_of_another_mask_is_refused(tmp_path: Path) -> None:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    learner = learner_of("compact/torch/fp32/adamw/1.0/2", world)
    learner.step(scores(0, VOCAB))
    learner.save(str(tmp_path))
    same = learner_of("compact/torch/fp32/adamw/1.0/2", world)
    same.load(str(tmp_path))
    assert same.version == 1
    everything = learner_of("early_delta/torch/fp32/adamw/1.0/2", world)
    with pytest.raises(ValueError, match="was trained with another mask"):
        everything.load(str(tmp_path))


@pytest.mark.parametrize("case", WATCHED)
def test_scores_of_a_watched_run_do_not_depend_on_stage_or_ranks(trained: Path, case: str) -> None:
    score, _, rest = case.split("/", 2)
    found, expected = weights(trained, case), weights(trained, f"{score}/torch/{rest}")
    assert found.keys() == expected.keys() == dict(named_weights(tiny())).keys()
    for name in expected:
        assert found[name].shape == expected[name].shape
        # an Adam step turns rounding noise of near-zero gradients into a part of a step
        far = ~torch.isclose(found[name], expected[name], rtol=1e-3, atol=1e-6)
        assert far.float().mean() < 0.01, name


def test_the_first_gradient_is_the_root_of_one_step_s_squares(trained: Path) -> None:
    first, squares = (weights(trained, case) for case in FIRST)
    for name in first:
        torch.testing.assert_close(first[name] ** 2, squares[name])
    assert all((squares[name] > 0).any() for name in squares)


def test_early_delta_is_how_far_the_masters_went(trained: Path) -> None:
    found = weights(trained, WATCHED_ALONE[0])
    # three warm-up and full AdamW steps at 3e-3 go 0.0075 at most, decay aside
    assert 0.005 < max(float(score.max()) for score in found.values()) < 0.0085
