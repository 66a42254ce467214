"""The null model says what an isotropic update shows, and no more."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.analysis.null import Null, isotropic_spectrum, solve_null
from opd.analysis.summary import summarize
from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from opd.checkpoint.chunks import BINS, binades
from tests.unit.analysis.pairs import Tensors, stepped, stored, weights

SHAPES = {
    "model.embed_tokens.weight": (1200, 96),
    "model.layers.0.self_attn.q_proj.weight": (192, 192),
    "model.layers.0.mlp.up_proj.weight": (400, 192),
    "model.layers.0.mlp.down_proj.weight": (192, 400),
}


def summed(folder: Path, base: Tensors, trained: Tensors, other: Tensors | None = None) -> Any:
    a, b = stored(folder / "a", base), stored(folder / "b", trained)
    c = None if other is None else stored(folder / "c", other)
    return summarize(
        measure_checkpoints(AnalysisInputs(base=a, trained=b, other=c), folder / "out")
    )


def leaves(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    return [] if tree is None else [tree]


FIGURES = ("exact_zero", "sparsity", "relative_sparsity", "coverage", "overlap")


def scores(folder: Path, seed: int) -> Any:
    """The summary of an isotropic update beside a second one."""
    base = weights(seed=seed, shapes=SHAPES)
    pair = (stepped(base, 3e-5, seed=1000 + 2 * seed), stepped(base, 3e-5, seed=1001 + 2 * seed))
    return summed(folder, base, *pair)


def test_every_excess_of_an_isotropic_update_is_within_its_spread(tmp_path: Path) -> None:
    found = [scores(tmp_path / str(seed), seed)["z"] for seed in range(12)]
    every = np.array([leaves({name: z[name] for name in FIGURES}) for z in found])
    assert every.shape[1] > 90
    assert (np.abs(every) < 2).mean() > 0.93
    assert np.abs(every).max() < 5
    assert 0.8 < every.std() < 1.1
    # figures of one update hang together, so their mean strays as much as that of a few
    assert abs(every.mean()) < 0.3
    for z in (z["exact_zero"] for z in found), (z["sparsity"]["1e-5"] for z in found):
        assert abs(np.mean(list(z))) < 2 / math.sqrt(len(found))
    projected = np.array([leaves(z["principal_projection"]) for z in found])
    assert (np.abs(projected) < 2).mean() > 0.9


def test_headline_figures_of_an_isotropic_update_have_no_excess(tmp_path: Path) -> None:
    found = scores(tmp_path, 0)
    z = found["z"]
    named = [z["exact_zero"], *leaves(z["sparsity"]), *leaves(z["overlap"])]
    named += [z["coverage"][m]["10%"]["1e-5"]["mean"] for m in ("principal", "low_magnitude")]
    assert len(named) == 1 + 5 + 3 + 2
    assert np.abs(named).max() < 2
    assert found["overlap_levels"]["1e-5"]["binade"]["lift"] == pytest.approx(1, abs=0.03)
    assert found["overlap_levels"]["1e-5"]["global"]["lift"] > 1.5
    rank = {part: found[part]["stable_rank"]["mean"] for part in ("paper", "null")}
    assert rank["paper"] == pytest.approx(rank["null"], rel=0.06)
    assert found["s"]["median"] == pytest.approx(3e-5, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_preference_for_small_weights_is_found(tmp_path: Path, dtype: torch.dtype) -> None:
    base = weights(shapes=SHAPES)
    generator = torch.Generator().manual_seed(3)
    trained = {}
    for name, w in base.items():
        scale = torch.where(w.float().abs() < 0.005, 4e-5, 2e-5)
        trained[name] = (w.float() + scale * torch.randn(w.shape, generator=generator)).to(dtype)
    found = summed(tmp_path, base, trained)
    assert found["z"]["coverage"]["low_magnitude"]["10%"]["1e-5"]["mean"] > 5
    assert found["z"]["coverage"]["low_magnitude"]["10%"]["1e-5"]["update_weighted_mean"] > 5


@pytest.mark.parametrize("on_grid", [True, False])
@pytest.mark.parametrize("s", [2e-6, 3e-5, 8e-4])
def test_closed_form_is_within_a_third_of_a_point_of_monte_carlo(on_grid: bool, s: float) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(400_000, generator=generator) * 0.02
    if on_grid:
        w = w.bfloat16().float()
    moved = (w + s * torch.randn(w.shape, generator=generator)).bfloat16() - w.bfloat16()
    moved = moved.abs().double().numpy()
    bins = binades(w.bfloat16())
    counts = np.bincount(bins, minlength=BINS)
    null = Null(s=s, mantissa=7, on_grid=on_grid)
    share = counts / counts.sum()
    assert share @ null.changed() == pytest.approx((moved > 0).mean(), abs=0.003)
    for e in (1e-7, 1e-6, 1e-5, 1e-4):
        assert share @ null.below(e) == pytest.approx((moved < e).mean(), abs=0.003)
        assert share @ null.above(e) == pytest.approx((moved > e).mean(), abs=0.003)
    assert share @ null.energy() == pytest.approx((moved**2).mean(), rel=0.06)
    for mine, top in zip(null.concentration(counts, (0.01, 0.05)), (4000, 20000), strict=True):
        energy = (np.sort(moved)[::-1][:top] ** 2).sum() / (moved**2).sum()
        assert mine == pytest.approx(energy, abs=0.02)
    again = solve_null(counts, float((moved**2).sum()), 7, on_grid)
    assert again.s == pytest.approx(s, rel=0.06)


def test_chance_of_a_change_is_the_complementary_error_function() -> None:
    null = Null(s=3e-5, mantissa=7, on_grid=True)
    weight = 0.03
    bin = binades(torch.tensor([weight]))[0]
    ulp = 2.0 ** (math.floor(math.log2(weight)) - 7)
    usual, half = (math.erfc(u / (2 * math.sqrt(2) * 3e-5)) for u in (ulp, ulp / 2))
    assert null.changed()[bin] == pytest.approx(usual + 0.375 / 128 * (half - usual))


def test_powers_of_two_are_nearer_to_their_lower_neighbour() -> None:
    """Over one binade, where the half step is what changes most."""
    generator = torch.Generator().manual_seed(0)
    w = (2.0**-6 * (1 + torch.rand(4_000_000, generator=generator))).bfloat16()
    w = w[(w >= 2.0**-6) & (w < 2.0**-5)].float()
    s = 1.6e-5
    moved = (w + s * torch.randn(w.shape, generator=generator)).bfloat16().float() != w
    bin = binades(w[:1])[0]
    seen, plain = int(moved.sum()), math.erfc(2.0**-14 / (math.sqrt(2) * s))
    null = float(Null(s=s, mantissa=7, on_grid=True).changed()[bin])
    spread = math.sqrt(len(w) * null)
    assert abs(seen - len(w) * plain) > 5 * spread
    # drawn from above 2^-6 only: the lower half of the power's cell is missing
    cells = null + (0.5 / 0.75 - 1) * (null - plain)
    assert abs(seen - len(w) * cells) < 3 * spread


def test_noise_of_the_cast_is_what_rounding_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(300_000, generator=generator) * 0.02).bfloat16()
    d = 3e-5 * torch.randn(w.shape, generator=generator)
    noise = ((w.float() + d).bfloat16().float() - w.float() - d).double()
    counts = np.bincount(binades(w), minlength=BINS)
    null = Null(s=3e-5, mantissa=7, on_grid=True)
    assert counts @ null.noise() == pytest.approx(float((noise**2).sum()), rel=0.02)


@pytest.mark.parametrize("shape", [(200, 200), (100, 400), (600, 150)])
def test_isotropic_spectrum_is_that_of_a_random_matrix(shape: tuple[int, int]) -> None:
    drawn = np.linalg.svd(np.random.default_rng(0).normal(size=shape), compute_uv=False)
    assert isotropic_spectrum(*shape) == pytest.approx(drawn, rel=0.05, abs=0.5)


def test_a_float32_copy_of_an_update_has_a_float32_null(tmp_path: Path) -> None:
    base = weights(shapes=SHAPES)
    found = summed(tmp_path, base, stepped(base, 3e-5, dtype=torch.float32))
    stored_null = found["stored"]["null"]["exact_zero"]
    assert stored_null == pytest.approx(found["stored"]["observed"]["exact_zero"], abs=1e-3)
    assert stored_null < 0.01 < 0.5 < found["null"]["exact_zero"]
    assert abs(found["z"]["exact_zero"]) < 3
