"""Headline figures of two checkpoints from the rows of their tensors: observed, null, excess and z.

Figures without a null have None there. z = (observed - null) / the standard deviation under the null.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd.analysis.blocks import BLOCKS, paper_block
from opd.analysis.change import (
    summarize_change,
    summarize_null_spread,
    summarize_overlap,
    summarize_spectrum,
    summarize_visible,
)
from opd.analysis.measure import (
    CHANGED_KEYS,
    RANK_KEYS,
    RELATIVE_KEYS,
    THRESHOLD_KEYS,
    TOP_KEYS,
)
from opd.analysis.overlap import pool_overlap
from opd.analysis.placement import MASKS
from opd.analysis.rows import Row, as_parts, as_stored

_MEDIAN = math.sqrt(math.pi / 2)
"""Standard deviation of the median of normal numbers / that of their mean."""
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, its expectation under the null and its standard deviation under the null."""

    observed: float
    null: float = math.nan
    sd: float = math.nan

    @property
    def excess(self) -> float:
        """Observed - null."""
        return self.observed - self.null

    @property
    def z(self) -> float:
        """Excess in standard deviations; 0 where both agree up to rounding, NaN without a deviation."""
        if abs(self.excess) <= 1e-12 * max(1.0, abs(self.observed)):
            return 0.0
        return self.excess / self.sd if self.sd > 0 else math.nan


def summarize(rows: Sequence[Row]) -> Tree:
    """``paper`` (bf16) and ``stored``, each with the same shape under null, excess and z.

    ``paper``, ``null``, ``excess`` and ``z`` are of bf16; ``stored`` holds its own four. Beside them
    the ways to count change, the tables by block, module type and layer, and what was left out.
    All are over tensors as stored, with spectra and masks of 2-D ones, as the paper's authors do; the
    tables are over the parts of fused tensors.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    sound, parts = as_stored(measured), as_parts(measured)
    paper, stored = (headline_figures(sound, precision) for precision in ("bf16", "stored"))
    found: Tree = {
        "paper": paper,
        "null": None,
        "excess": None,
        "z": None,
        "stored": {"observed": stored, "null": stored, "excess": stored, "z": stored},
        "change": {
            precision: summarize_change(sound, precision) for precision in ("bf16", "stored")
        },
        "visible_of_true": summarize_visible(sound),
        "s": summarize_null_spread(sound),
        "spectrum": summarize_spectrum(sound),
        "overlap_levels": summarize_overlap(sound),
        **{key: _groups(parts, key) for key in ("block", "module", "layer")},
        "tensors": {"measured": len(sound), "left_out": _left_out(rows)},
    }
    for key, part in PARTS.items():
        found["paper" if key == "observed" else key] = extract_part(paper, part)
        found["stored"][key] = extract_part(stored, part)
    return extract_part(found, PARTS["observed"])


PARTS: dict[str, Callable[[Figure], float]] = {
    "observed": lambda figure: figure.observed,
    "null": lambda figure: figure.null,
    "excess": lambda figure: figure.excess,
    "z": lambda figure: figure.z,
}


def extract_part(tree: Any, part: Callable[[Figure], float]) -> Any:
    """One part of every figure; NaN and infinity become None, which JSON can represent."""
    match tree:
        case dict():
            return {str(key): extract_part(value, part) for key, value in tree.items()}
        case list() | tuple():
            return [extract_part(value, part) for value in tree]
        case Figure():
            return extract_part(part(tree), part)
        case float():
            return tree if math.isfinite(tree) else None
    return tree


def headline_figures(rows: Sequence[Row], precision: str) -> Tree:
    """The headline figures of some tensors; spectral ones are over matrices that changed."""
    views = [row[precision] | {"numel": row["numel"]} for row in rows]
    changed = [view for view in views if "spectrum" in view]
    n = sum(view["numel"] for view in views)
    energy = sum(view["energy"] for view in views)
    norm = _ratio(math.sqrt(energy), math.sqrt(sum(view["base_energy"] for view in views)))
    found: Tree = {
        "relative_norm": Figure(norm),
        "exact_zero": _pooled([(v["zero"], *v["expected"]["zero"]) for v in views], n),
        "sparsity": {key: _below(views, "below", key, n) for key in THRESHOLD_KEYS},
        "relative_sparsity": {
            key: _below(views, "relative_below", key, n) for key in RELATIVE_KEYS
        },
        "coordinate_energy": {key: _top(views, key, energy) for key in TOP_KEYS},
        **_spectral(changed),
        "coverage": {
            mask: {r: {c: coverage(changed, mask, r, c) for c in CHANGED_KEYS} for r in RANK_KEYS}
            for mask in MASKS
        },
        "energy_share": {block: _energy_share(rows, precision, block) for block in BLOCKS},
    }
    if precision == "bf16" and any("overlap" in row for row in rows):
        found["overlap"] = _overlap(rows)
    return found


def _pooled(counts: list[tuple[float, float, float]], n: int) -> Figure:
    """A figure from (observed, mean, variance) of counts, as a share of n."""
    if not n:
        return Figure(math.nan)
    observed, mean, variance = (sum(column) for column in zip(*counts, strict=True))
    return Figure(observed / n, mean / n, math.sqrt(variance) / n)


def _below(views: list[Tree], kind: str, key: str, n: int) -> Figure:
    return _pooled([(v[kind][key], *v["expected"][kind][key]) for v in views], n)


def _top(views: list[Tree], key: str, energy: float) -> Figure:
    changed = [view for view in views if view["energy"]]
    observed = sum(view["top"][key] for view in changed)
    null = sum(view["expected"]["top"][key] for view in changed)
    return Figure(_ratio(observed, energy), _ratio(null, energy))


def _spectral(views: list[Tree]) -> Tree:
    """Means and medians over matrices. The null of shares and ranks is the Marchenko-Pastur law."""
    found = [view["spectrum"] for view in views]

    whole = [s for s in found if "bound" not in s]

    def over(key: str) -> dict[str, Figure]:
        return averages([Figure(s[key], s["isotropic"][key]) for s in found if key in s])

    def rank_share(key: str) -> dict[str, Figure]:
        name = f"numerical_rank_{key}"
        return averages(
            [Figure(s[name] / s["smaller"], s["isotropic"][name] / s["smaller"]) for s in whole]
        )

    def projection(key: str) -> dict[str, Figure]:
        parts = ("projection", "projection_null", "projection_sd")
        return averages([Figure(*(s[part][key] for part in parts)) for s in whole])

    return {
        "top_energy": {k: over(f"energy_{k}") for k in ("1", "8", "16")},
        "stable_rank": over("stable_rank"),
        "effective_rank": over("effective_rank"),
        "numerical_rank_share": {t: rank_share(t) for t in ("1e-6", "1e-5", "1e-4")},
        "principal_projection": {key: projection(key) for key in RANK_KEYS},
        "subspace_rotation": {
            key: averages([Figure(s["rotation"][key]) for s in whole]) for key in RANK_KEYS
        },
        "spectral_drift": averages([Figure(s["drift"]) for s in whole]),
    }


def averages(figures: list[Figure]) -> dict[str, Figure]:
    """Mean and median over matrices; unknown values are left out."""
    known = [f for f in figures if math.isfinite(f.observed)]
    if not known:
        return {"mean": Figure(math.nan), "median": Figure(math.nan)}
    nulls = [f.null for f in known]
    sd = math.sqrt(sum(f.sd**2 for f in known)) / len(known)
    observed = [f.observed for f in known]
    return {
        "mean": Figure(statistics.fmean(observed), statistics.fmean(nulls), sd),
        "median": Figure(statistics.median(observed), statistics.median(nulls), _MEDIAN * sd),
    }


def coverage(views: list[Tree], mask: str, share: str, changed: str) -> dict[str, Figure]:
    """Mean, median, and the mean weighted by the number of changed coordinates of each matrix."""
    masks = [view["coverage"][share] for view in views]
    cells = [cells[mask][changed] for cells in masks if mask in cells]
    cells = [cell for cell in cells if cell["changed"]]
    found = averages([Figure(c["coverage"], c["null"], c["sd"]) for c in cells])
    total = sum(cell["changed"] for cell in cells)
    if not total:
        return found | {"update_weighted_mean": Figure(math.nan)}
    observed = sum(cell["inside"] for cell in cells) / total
    null = sum(cell["changed"] * cell["null"] for cell in cells) / total
    sd = math.sqrt(sum((cell["changed"] * cell["sd"]) ** 2 for cell in cells)) / total
    return found | {"update_weighted_mean": Figure(observed, null, sd)}


def _energy_share(rows: Sequence[Row], precision: str, block: str) -> Figure:
    """A block's share of the energy; its null is its share of the parameters."""
    members = [row for row in rows if paper_block(row["name"]) == block]
    energy = sum(row[precision]["energy"] for row in rows)
    return Figure(
        _ratio(sum(row[precision]["energy"] for row in members), energy),
        _ratio(sum(row["numel"] for row in members), sum(row["numel"] for row in rows)),
    )


def _overlap(rows: Sequence[Row]) -> dict[str, Figure]:
    """At abs(D) > 1e-5. The null fixes the counts per binade of each tensor; random_* only densities."""
    found = pool_overlap(list(rows), "1e-5")
    if found is None:
        return {}
    chance = found.expected["binade"]
    sd = math.sqrt(max(chance.variance, 0.0))
    either = found.a + found.b - chance.mean
    return {
        "a_covered_by_b": _share(found.both, chance.mean, sd, found.a),
        "b_covered_by_a": _share(found.both, chance.mean, sd, found.b),
        "jaccard": Figure(
            found.jaccard,
            found.expected_jaccard("binade"),
            _ratio(sd * (found.a + found.b), either**2),
        ),
        "random_a_covered_by_b": Figure(_ratio(found.b, found.numel)),
        "random_b_covered_by_a": Figure(_ratio(found.a, found.numel)),
    }


def _share(observed: float, mean: float, sd: float, total: int) -> Figure:
    return Figure(_ratio(observed, total), _ratio(mean, total), _ratio(sd, total))


def _groups(rows: Sequence[Row], key: str) -> Tree:
    """By block, module type or layer: shares of energy and of parameters, and pooled figures."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("outside" if row[key] is None else str(row[key]), []).append(row)
    energy = sum(row["bf16"]["energy"] for row in rows)
    n = sum(row["numel"] for row in rows)
    table: Tree = {}
    for name, members in groups.items():
        share = _ratio(sum(row["bf16"]["energy"] for row in members), energy)
        parameters = _ratio(sum(row["numel"] for row in members), n)
        headlines = headline_figures(members, "bf16")
        table[name] = {
            "numel": sum(row["numel"] for row in members),
            "parameter_share": parameters,
            "energy_share": share,
            "energy_per_parameter": _ratio(share, parameters),
            **{k: extract_part(headlines["sparsity"]["1e-5"], part) for k, part in PARTS.items()},
            "relative_norm": headlines["relative_norm"],
            "stable_rank": headlines["stable_rank"]["median"],
            "top_energy_16": headlines["top_energy"]["16"]["median"],
        }
    return table


def _left_out(rows: Sequence[Row]) -> dict[str, str]:
    left = {row["name"]: row["status"] for row in rows if row["status"] != "ok"}
    others = {
        row["name"]: f"overlap: {row['overlap']['status']}"
        for row in rows
        if row.get("overlap", {}).get("status", "ok") != "ok"
    }
    return left | others


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
