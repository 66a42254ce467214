"""The levels of chance agree with simulation, and overlaps with those of sets."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opd.checkpoint.tensors import open_checkpoint
from opd.config.mask import MaskRule, RuleConfig
from opd.mask.compare import Expected, MaskComparison, compare
from opd.mask.mask import Mask
from tests.unit.mask.models import discovered, flat, stored, weights


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model than the others', so that lifts are sharp."""
    generator = torch.Generator().manual_seed(0)
    made = {
        name: (torch.randn(shape, generator=generator) * scale).bfloat16()
        for name, shape, scale in (
            ("model.embed_tokens.weight", (500, 200), 0.02),
            ("model.layers.0.mlp.down_proj.weight", (200, 500), 0.05),
            ("model.layers.1.mlp.down_proj.weight", (200, 500), 0.3),
            ("model.norm.weight", (200,), 1.0),
        )
    }
    return stored(tmp_path_factory.mktemp("m") / "base", made)


def found(base: Path, out: Path, rule: MaskRule, **given: object) -> Mask:
    return discovered(base, RuleConfig(rule=rule, **given), out)[0]  # pyright: ignore


def compared(base: Path, a: Mask, b: Mask) -> MaskComparison:
    return compare(a, b, open_checkpoint(str(base)))


def test_two_random_masks_overlap_as_chance_says(base: Path, tmp_path: Path) -> None:
    a, b = (found(base, tmp_path / f"{s}", MaskRule.random, density=0.2, seed=s) for s in (1, 2))
    whole = compared(base, a, b).whole
    for level in ("global", "tensor", "binade"):
        assert whole.lift(level) == pytest.approx(1.0, abs=0.03)
        assert abs(whole.z(level)) < 4


def test_two_magnitude_matched_masks_overlap_as_their_binades_say(
    base: Path, tmp_path: Path
) -> None:
    found(base, tmp_path / "like", MaskRule.near_zero, density=0.2)
    like = str(tmp_path / "like")
    a, b = (
        found(base, tmp_path / f"{s}", MaskRule.magnitude_matched, like=like, seed=s)
        for s in (1, 2)
    )
    whole = compared(base, a, b).whole
    assert whole.lift("binade") == pytest.approx(1.0, abs=0.03)
    assert abs(whole.z("binade")) < 4
    assert whole.lift("global") > 2
    assert whole.z("tensor") > 100


def test_the_variance_of_chance_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    sizes, a, b = np.array([50, 8, 1, 30]), np.array([20, 3, 1, 30]), np.array([10, 5, 0, 4])
    draws = sum(
        rng.hypergeometric(k, n - k, m, 40_000) if m else np.zeros(40_000)
        for n, k, m in zip(sizes, a, b, strict=True)
    )
    expected = Expected.from_counts(sizes, a, b)
    assert expected.mean == pytest.approx(float(np.mean(draws)), rel=0.02)
    assert expected.variance == pytest.approx(float(np.var(draws)), rel=0.03)


def test_coverage_and_jaccard_are_those_of_the_sets(base: Path, tmp_path: Path) -> None:
    a = found(base, tmp_path / "a", MaskRule.near_zero, density=0.3)
    b = found(base, tmp_path / "b", MaskRule.random, density=0.1)
    result = compare(a, b)
    in_a, in_b = flat(a), flat(b)
    assert result.whole.coverage_of_a == (in_a & in_b).sum() / in_a.sum()
    assert result.whole.coverage_of_b == (in_a & in_b).sum() / in_b.sum()
    assert result.whole.jaccard == (in_a & in_b).sum() / (in_a | in_b).sum()
    assert set(result.whole.expected) == {"global", "tensor"}
    assert sum(module.both for module in result.modules) == result.whole.both
    assert [module.name for module in result.modules] == ["embed_tokens", "down_proj", "norm"]


def test_an_empty_mask_has_no_coverage(base: Path, tmp_path: Path) -> None:
    a = found(base, tmp_path / "a", MaskRule.random, density=0.1)
    nothing = a.difference(a)
    assert np.isnan(compare(nothing, a).whole.coverage_of_a)
    assert np.isnan(compare(nothing, a).whole.z("global"))


def test_masks_and_weights_of_another_base_are_refused(base: Path, tmp_path: Path) -> None:
    other = stored(tmp_path / "other", weights())
    a = found(base, tmp_path / "a", MaskRule.random, density=0.1)
    b = found(other, tmp_path / "b", MaskRule.random, density=0.1)
    with pytest.raises(ValueError, match="the mask was made for"):
        compare(a, b)
    with pytest.raises(ValueError, match="the mask was made for"):
        compare(a, a, open_checkpoint(str(other)))
