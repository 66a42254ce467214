"""All figures of one tensor, as a row of plain numbers that JSON holds."""

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
    compare_visible,
    count,
    describe_non_finite,
    on_bf16_grid,
)
from opd.analysis.fast import bound_leading_values
from opd.analysis.formatting import Spectrum
from opd.analysis.null import Null, isotropic_spectrum, noise_edge, solve_null
from opd.analysis.overlap import count_overlap
from opd.analysis.pair import Pair
from opd.analysis.placement import MASKS, MaskCounts, locate_changes
from opd.analysis.rows import Row
from opd.analysis.sides import MANTISSA, NumberFormat, Sides
from opd.analysis.spectrum import RANKS, Spectra, principal_rank, spectra, spectral_metrics
from opd.checkpoint.names import place
from opd.checkpoint.tensors import dtype_name

_CURVE_POINTS = 64
"""Singular values kept of each spectrum, evenly spaced over the logarithm of their rank."""


def format_keys(values: tuple[float, ...], unit: str = "") -> list[str]:
    """Thresholds and shares as keys: 1e-05 as "1e-5", with unit "%" 0.01 as "1%"."""
    if unit == "%":
        return [f"{100 * value:g}%" for value in values]
    return [f"{value:.0e}".replace("e-0", "e-") for value in values]


THRESHOLD_KEYS, RELATIVE_KEYS = format_keys(THRESHOLDS), format_keys(RELATIVE)
TOP_KEYS, RANK_KEYS = format_keys(TOP, "%"), format_keys(RANKS, "%")
CHANGED_KEYS = ("0", format_keys((VISIBLE,))[0])


def measure_pair(pair: Pair, other: Pair | None = None, spectrum: Spectrum = Spectrum.exact) -> Row:
    """The row of one tensor; ``status`` is "ok" or the reason why there are no figures.

    ``other`` is the same tensor of a second trained model. A tensor is read once, memory-mapped where
    the file allows it.
    """
    location = place(pair.name)
    row: Row = {
        "name": pair.name,
        "layer": location.layer,
        "module": location.module,
        "block": location.block,
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
    problem = describe_non_finite(sides)
    if problem:
        return row | {"status": problem}
    try:
        return row | _numbers(sides, spectrum) | count_overlap(sides, other)
    except torch.linalg.LinAlgError as error:  # pyright: ignore[reportPrivateImportUsage]
        return row | {"status": f"no decomposition ({str(error).splitlines()[0]})"}


def _numbers(sides: Sides, spectrum: Spectrum) -> Row:
    is_finer = not on_bf16_grid(sides.trained)
    found: Row = {}
    true = compare_visible(sides.base, sides.trained) if is_finer else None
    s = None if true is None else math.sqrt(true.pop("true_energy") / sides.numel)
    found["visible"] = true
    found["bf16"] = _view(sides, s, spectrum)
    if {sides.base.dtype, sides.trained.dtype} == {torch.bfloat16}:
        found["stored"] = found["bf16"]
    else:
        stored = Sides(base=sides.base, trained=sides.trained, precision=NumberFormat.stored)
        found["stored"] = _view(stored, None, spectrum)
    return found


def _view(sides: Sides, s: float | None, spectrum: Spectrum) -> Row:
    """The figures in one number format. ``s``: standard deviation of the true update, if known."""
    counts = count(sides)
    is_rounded = sides.mantissa == MANTISSA[torch.bfloat16]
    on_grid = not is_rounded or on_bf16_grid(sides.base)
    weights = counts.binades[0]
    powers = counts.powers / np.maximum(weights, 1)
    if s is None:
        null = solve_null(weights, counts.energy, sides.mantissa, on_grid, powers)
    else:
        null = Null(s=s, mantissa=sides.mantissa, on_grid=on_grid, powers=powers)
    view = _coordinate_figures(counts, null)
    view["null"] = {"s": null.s, "s_from": "the visible norm" if s is None else "the true update"}
    if sides.base.dim() == 2 and counts.energy > 0:
        view |= _matrix_figures(sides, null, counts, spectrum)
    return view


def _matrix_figures(sides: Sides, null: Null, counts: Counts, spectrum: Spectrum) -> Row:
    """Figures of the spectra, and coverage of the masks that they allow."""
    match spectrum:
        case Spectrum.exact:
            found = spectra(sides)
            directions, masks = found.directions, tuple(MASKS)
            curves = {"base": found.base, "trained": found.trained, "update": found.update}
            figures = _spectral_figures(found, sides.shape)
        case Spectrum.fast:
            leading = bound_leading_values(sides)
            directions, masks = None, ("low_magnitude",)
            curves = {"update": leading.least, "update_at_most": leading.most}
            figures = leading.metrics() | {"bound": leading.bounds()}
    chance = _chance(sides.shape, null, counts)
    chance["above_noise"] = int((curves["update"] > chance["noise_edge"]).sum())
    return {
        "spectrum": figures | chance | {"curve": _curve(curves)},
        "coverage": {
            key: _coverage(placement, null, masks)
            for key, placement in zip(RANK_KEYS, locate_changes(sides, directions), strict=True)
        },
    }


def _curve(curves: dict[str, np.ndarray]) -> Row:
    """Singular values at some ranks, evenly spaced over the logarithm."""
    number = len(curves["update"])
    ranks = np.unique(np.geomspace(1, number, min(_CURVE_POINTS, number)).round().astype(int))
    return {"rank": ranks.tolist()} | {name: s[ranks - 1].tolist() for name, s in curves.items()}


def _coordinate_figures(counts: Counts, null: Null) -> Row:
    """Figures of coordinates; "expected" holds pairs of mean and variance under the null."""
    weights = counts.binades[0]
    rms = math.sqrt(counts.base_energy / counts.numel)
    used = np.flatnonzero(weights)
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
        "binades": {"bin": used.tolist(), "counts": counts.binades[:, used].tolist()},
        "expected": {
            "zero": _expected_count(weights, 1 - null.changed()),
            "below": {
                k: _expected_count(weights, null.below(t))
                for k, t in zip(THRESHOLD_KEYS, THRESHOLDS, strict=True)
            },
            "relative_below": {
                k: _expected_count(weights, null.below(t * rms))
                for k, t in zip(RELATIVE_KEYS, RELATIVE, strict=True)
            },
            "top": _named(TOP_KEYS, counts.energy * np.array(null.concentration(weights, TOP))),
            "changed_by_binade": null.changed()[used].tolist(),
        },
    }


def _chance(shape: tuple[int, int], null: Null, counts: Counts) -> Row:
    """Spectral figures of a random matrix of this shape and norm, and of the noise of the cast."""
    rows, columns = shape
    size = math.sqrt(counts.energy / (rows * columns))
    return {
        "smaller": min(shape),
        "isotropic": spectral_metrics(isotropic_spectrum(rows, columns)),
        "noise_edge": noise_edge(null, counts.binades[0], rows, columns),
        "isotropic_edge": size * (math.sqrt(rows) + math.sqrt(columns)),
    }


def _spectral_figures(found: Spectra, shape: tuple[int, int]) -> Row:
    """Figures that need all singular values, or directions."""
    rows, columns = shape
    ranks = [principal_rank(r, min(shape)) for r in RANKS]
    drift, drift_of_update = found.drift()
    return spectral_metrics(found.update) | {
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


def _coverage(placement: MaskCounts, null: Null, masks: tuple[str, ...]) -> Row:
    """For each mask its density; for each definition of changed, the counts and the null's share.

    The null's share is a ratio of sums of independent draws; its variance is taken to first order.
    """
    total = placement.table.sum(axis=1)
    chances = (null.changed(), null.above(VISIBLE))
    coverage: Row = {}
    for mask in masks:
        inside = placement.counts_inside(mask)
        coverage[mask] = {"density": _ratio(float(inside.sum()), float(total.sum()))}
        for key, chance, first in zip(CHANGED_KEYS, chances, (1, 2), strict=True):
            covered, changed = int(inside[first:].sum()), int(total[first:].sum())
            mean, variance = expected_share(inside.sum(0), total.sum(0), chance)
            coverage[mask][key] = {
                "inside": covered,
                "changed": changed,
                "coverage": _ratio(covered, changed),
                "null": mean,
                "sd": math.sqrt(variance),
            }
    return coverage


def expected_share(
    inside: np.ndarray, total: np.ndarray, chance: np.ndarray
) -> tuple[float, float]:
    """Mean and variance of the share of changed coordinates that are ``inside``; all [BINS]."""
    changed = float(total @ chance)
    if not changed:
        return math.nan, math.nan
    mean, variances = float(inside @ chance) / changed, chance * (1 - chance)
    within, outside = float(inside @ variances), float((total - inside) @ variances)
    return mean, ((1 - mean) ** 2 * within + mean**2 * outside) / changed**2


def _expected_count(weights: np.ndarray, chance: np.ndarray) -> list[float]:
    """Mean and variance of a count of weights; ``chance`` is that of one weight, by binade [BINS]."""
    return [float(weights @ chance), float(weights @ (chance * (1 - chance)))]


def _named(keys: list[str], values: Any) -> dict[str, float]:
    return dict(zip(keys, np.asarray(list(values)).tolist(), strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
