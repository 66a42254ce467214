"""The null model of "exactly unchanged" has no bias, on the format's grid or off it."""

import math

import numpy as np
import pytest
import torch

from opd.analysis.counts import count, on_bf16_grid
from opd.analysis.null import Null
from opd.analysis.sides import NumberFormat, Sides

PAIRS = 16


def z_of_unchanged(size: int, s: float, seed: int, is_on_grid: bool) -> float:
    """Standard deviations by which the unchanged weights of an isotropic update exceed the null."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.03 * torch.randn(size, generator=generator)
    base = base.bfloat16().float() if is_on_grid else base
    trained = base + s * torch.randn(size, generator=generator)
    counts = count(Sides(base=base, trained=trained, precision=NumberFormat.bf16))
    weights = counts.binades[0]
    powers = counts.powers / np.maximum(weights, 1)
    null = Null(s=s, mantissa=7, on_grid=on_bf16_grid(base), powers=powers)
    chance = 1 - null.changed()
    spread = math.sqrt(weights @ (chance * (1 - chance)))
    return float(counts.zero - weights @ chance) / spread


@pytest.mark.parametrize("is_on_grid", [True, False])
@pytest.mark.parametrize(("size", "s"), [(1 << 17, 3e-5), (1 << 19, 1e-4), (1 << 19, 4e-4)])
def test_mean_z_is_within_its_sampling_error(size: int, s: float, is_on_grid: bool) -> None:
    z = np.array([z_of_unchanged(size, s, seed, is_on_grid) for seed in range(PAIRS)])
    assert abs(z.mean()) < 2.5 / math.sqrt(PAIRS)
    assert 0.5 < z.std() < 1.5


@pytest.mark.parametrize("is_on_grid", [True, False])
@pytest.mark.parametrize("s", [1e-5, 4e-5, 2e-4])
def test_powers_of_two_change_as_often_as_the_null_says(s: float, is_on_grid: bool) -> None:
    """Among the weights of the power's own cell, where a formula without it is far off."""
    generator = torch.Generator().manual_seed(0)
    power, spacing = 2.0**-6, 2.0**-13
    place = torch.rand(400_000, generator=generator, dtype=torch.float64)
    base = (power + (0.75 * place - 0.25) * spacing) if not is_on_grid else power + 0 * place
    d = s * torch.randn(len(base), generator=generator, dtype=torch.float64)
    after = (base + d).float().bfloat16().double()
    seen = float((after != power).double().mean())
    only = np.ones(256)
    null = Null(s=s, mantissa=7, on_grid=is_on_grid, powers=only)
    bin = int(np.flatnonzero(np.exp2(np.arange(256) - 128.0) == power)[0])
    assert null.changed()[bin] == pytest.approx(seen, abs=3 * math.sqrt(0.25 / len(base)))
    moved = (after - power).abs()
    energy = float((moved**2).mean())
    assert null.energy()[bin] == pytest.approx(energy, rel=0.02)
