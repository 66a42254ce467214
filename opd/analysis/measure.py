"""Everything that is said about one tensor, as a row of plain numbers that JSON holds."""

import math
from typing import Any

import numpy as np
import torch

from opd.analysis.counts import (
    RELATIVE,
    THRESHOLDS,
    TOP,
    VISIBLE,
    Counts,
    bad_numbers,
    count,
    on_bf16_grid,
    visible_and_true,
)
from opd.analysis.fast import leading
from opd.analysis.formatting import Spectrum
from opd.analysis.null import Null, isotropic_spectrum, noise_edge, solved
from opd.analysis.overlap import overlap_row
from opd.analysis.pair import Pair
from opd.analysis.placement import MASKS, Placement, placements
from opd.analysis.rows import Row
from opd.analysis.sides import MANTISSA, NumberFormat, Sides
from opd.analysis.spectrum import RANKS, Spectra, rank_of, shape_of, spectra
from opd.checkpoint.names import place
from opd.checkpoint.tensors import dtype_name

_DRAWN = 64
"""Singular values kept of each spectrum, spread evenly over the logarithm of their rank."""


def words(values: tuple[float, ...], unit: str = "") -> list[str]:
    """Thresholds and shares as keys: 1e-05 is "1e-5", with unit "%" 0.01 is "1%"."""
    if unit == "%":
        return [f"{100 * value:g}%" for value in values]
    return [f"{value:.0e}".replace("e-0", "e-") for value in values]


THRESHOLD_KEYS, RELATIVE_KEYS = words(THRESHOLDS), words(RELATIVE)
TOP_KEYS, RANK_KEYS = words(TOP, "%"), words(RANKS, "%")
CHANGED_KEYS = ("0", words((VISIBLE,))[0])


def measured(pair: Pair, other: Pair | None = None, spectrum: Spectrum = Spectrum.exact) -> Row:
    """The row of one tensor; ``status`` is "ok" or the reason why there are no numbers.

    ``other`` is the same tensor of a second trained model. A tensor is read once, mapped where the
    file allows it.
    """
    where = place(pair.name)
    row: Row = {
        "name": pair.name,
        "layer": where.layer,
        "module": where.module,
        "block": where.block,
        "shape": list(pair.shape),
        "numel": pair.numel,
        "part_of": pair.part_of,
        "is_fused": pair.is_fused,
        "dtypes": [
            dtype_name(side.dtype) for side in (pair.base, pair.trained) if side is not None
        ],
        "status": pair.reason or "ok",
    }
    if pair.reason:
        return row
    assert pair.base is not None
    assert pair.trained is not None
    base, trained = pair.base.read(), pair.trained.read()
    sides = Sides(base=base, trained=trained, precision=NumberFormat.bf16)
    bad = bad_numbers(sides)
    if bad:
        return row | {"status": bad}
    try:
        return row | _numbers(sides, spectrum) | overlap_row(sides, other)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        return row | {"status": f"no decomposition ({str(error).splitlines()[0]})"}


def _numbers(sides: Sides, spectrum: Spectrum) -> Row:
    known = not on_bf16_grid(sides.trained)
    found: Row = {}
    true = visible_and_true(sides.base, sides.trained) if known else None
    s = None if true is None else math.sqrt(true.pop("true_energy") / sides.numel)
    found["visible"] = true
    found["bf16"] = _view(sides, s, spectrum)
    both = {sides.base.dtype, sides.trained.dtype}
    if both == {torch.bfloat16}:
        found["stored"] = found["bf16"]
    else:
        stored = Sides(base=sides.base, trained=sides.trained, precision=NumberFormat.stored)
        found["stored"] = _view(stored, None, spectrum)
    return found


def _view(sides: Sides, s: float | None, spectrum: Spectrum) -> Row:
    """One precision. ``s``: the standard deviation of the true update where it is known."""
    counts = count(sides)
    is_rounded = sides.mantissa == MANTISSA[torch.bfloat16]
    on_grid = not is_rounded or on_bf16_grid(sides.base)
    weights = counts.binades[0]
    if s is None:
        null = solved(weights, counts.energy, sides.mantissa, on_grid)
    else:
        null = Null(s=s, mantissa=sides.mantissa, on_grid=on_grid)
    told = _counted(counts, null)
    told["null"] = {"s": null.s, "s_from": "the visible norm" if s is None else "the true update"}
    if sides.base.dim() == 2 and counts.energy > 0:
        told |= _of_matrix(sides, null, counts, spectrum)
    return told


def _of_matrix(sides: Sides, null: Null, counts: Counts, spectrum: Spectrum) -> Row:
    """Spectra, and coverage of the masks that they allow."""
    match spectrum:
        case Spectrum.exact:
            found = spectra(sides)
            directions, masks = found.directions, tuple(MASKS)
            curves = {"base": found.base, "trained": found.trained, "update": found.update}
            told = _spectral(found, sides.shape)
        case Spectrum.fast:
            few = leading(sides)
            directions, masks = None, ("low_magnitude",)
            curves = {"update": few.least, "update_at_most": few.most}
            told = few.shape() | {"bound": few.bounds()}
    chance = _chance(sides.shape, null, counts)
    chance["above_noise"] = int((curves["update"] > chance["noise_edge"]).sum())
    return {
        "spectrum": told | chance | {"curve": _curve(curves)},
        "coverage": {
            key: _coverage(placement, null, masks)
            for key, placement in zip(RANK_KEYS, placements(sides, directions), strict=True)
        },
    }


def _curve(curves: dict[str, np.ndarray]) -> Row:
    """Singular values at some ranks, evenly over the logarithm."""
    number = len(curves["update"])
    at = np.unique(np.geomspace(1, number, min(_DRAWN, number)).round().astype(int))
    return {"rank": at.tolist()} | {name: s[at - 1].tolist() for name, s in curves.items()}


def _counted(counts: Counts, null: Null) -> Row:
    """Coordinates by coordinates. Under "expected" lie pairs of mean and variance."""
    weights = counts.binades[0]
    rms = math.sqrt(counts.base_energy / counts.numel)
    here = np.flatnonzero(weights)
    return {
        "base_energy": counts.base_energy,
        "energy": counts.energy,
        "largest": counts.largest,
        "relative_norm": _ratio(math.sqrt(counts.energy), math.sqrt(counts.base_energy)),
        "zero": counts.zero,
        "bitwise": counts.bitwise,
        "rule": counts.rule,
        "below": _named(THRESHOLD_KEYS, counts.below),
        "relative_below": _named(RELATIVE_KEYS, counts.relative_below),
        "top": _named(TOP_KEYS, counts.top),
        "ulps": counts.ulps.tolist(),
        "binades": {"bin": here.tolist(), "counts": counts.binades[:, here].tolist()},
        "expected": {
            "zero": _sum(weights, 1 - null.changed()),
            "below": {
                k: _sum(weights, null.below(t))
                for k, t in zip(THRESHOLD_KEYS, THRESHOLDS, strict=True)
            },
            "relative_below": {
                k: _sum(weights, null.below(t * rms))
                for k, t in zip(RELATIVE_KEYS, RELATIVE, strict=True)
            },
            "top": _named(TOP_KEYS, counts.energy * np.array(null.concentration(weights, TOP))),
            "changed_by_binade": null.changed()[here].tolist(),
        },
    }


def _chance(shape: tuple[int, int], null: Null, counts: Counts) -> Row:
    """Spectra of a random matrix of this shape and norm, and of the noise of the cast."""
    rows, columns = shape
    size = math.sqrt(counts.energy / (rows * columns))
    return {
        "smaller": min(shape),
        "isotropic": shape_of(isotropic_spectrum(rows, columns)),
        "noise_edge": noise_edge(null, counts.binades[0], rows, columns),
        "isotropic_edge": size * (math.sqrt(rows) + math.sqrt(columns)),
    }


def _spectral(found: Spectra, shape: tuple[int, int]) -> Row:
    """What needs all singular values, and directions."""
    rows, columns = shape
    ranks = [rank_of(r, min(shape)) for r in RANKS]
    drift, drift_of_update = found.drift()
    return shape_of(found.update) | {
        "projection": _named(RANK_KEYS, found.projection.values()),
        "left": _named(RANK_KEYS, found.left.values()),
        "right": _named(RANK_KEYS, found.right.values()),
        "projection_null": _named(RANK_KEYS, [k * k / (rows * columns) for k in ranks]),
        "left_null": _named(RANK_KEYS, [k / rows for k in ranks]),
        "right_null": _named(RANK_KEYS, [k / columns for k in ranks]),
        "projection_sd": _named(RANK_KEYS, [math.sqrt(2) * k / (rows * columns) for k in ranks]),
        "rotation": _named(RANK_KEYS, found.rotation.values()),
        "drift": drift,
        "drift_of_update": drift_of_update,
    }


def _coverage(placement: Placement, null: Null, masks: tuple[str, ...]) -> Row:
    """For each mask its density, and for each way to have changed: inside, all, and the null's share.

    The null's share is a ratio of sums of independent draws; its variance is that of the ratio to
    first order.
    """
    everything = placement.table.sum(axis=1)
    chances = (null.changed(), null.above(VISIBLE))
    told: Row = {}
    for mask in masks:
        held = placement.held(mask)
        told[mask] = {"density": _ratio(float(held.sum()), float(everything.sum()))}
        for key, chance, first in zip(CHANGED_KEYS, chances, (1, 2), strict=True):
            inside, changed = int(held[first:].sum()), int(everything[first:].sum())
            mean, variance = ratio_of_draws(held.sum(0), everything.sum(0), chance)
            told[mask][key] = {
                "inside": inside,
                "changed": changed,
                "coverage": _ratio(inside, changed),
                "null": mean,
                "sd": math.sqrt(variance),
            }
    return told


def ratio_of_draws(
    held: np.ndarray, everything: np.ndarray, chance: np.ndarray
) -> tuple[float, float]:
    """Mean and variance of the share of changed coordinates that lie among ``held``, all [BINS]."""
    total = float(everything @ chance)
    if not total:
        return math.nan, math.nan
    mean, spread = float(held @ chance) / total, chance * (1 - chance)
    inside, outside = float(held @ spread), float((everything - held) @ spread)
    return mean, ((1 - mean) ** 2 * inside + mean**2 * outside) / total**2


def _sum(weights: np.ndarray, chance: np.ndarray) -> list[float]:
    """Mean and variance of a count."""
    return [float(weights @ chance), float(weights @ (chance * (1 - chance)))]


def _named(keys: list[str], values: Any) -> dict[str, float]:
    return dict(zip(keys, np.asarray(list(values)).tolist(), strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
