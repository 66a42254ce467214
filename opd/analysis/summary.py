"""Headline numbers of a pair from its tensors' rows: observed, null, excess and z in one shape.

Figures without a null of their own hold None there. A z is (observed - null) / its standard
deviation under the null.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from opd.analysis.blocks import BLOCKS, block_of_paper
from opd.analysis.change import change, overlap_levels, spectrum, spread, visible
from opd.analysis.measure import (
    CHANGED_KEYS,
    RANK_KEYS,
    RELATIVE_KEYS,
    THRESHOLD_KEYS,
    TOP_KEYS,
)
from opd.analysis.overlap import overlaps
from opd.analysis.placement import MASKS
from opd.analysis.rows import Row, as_parts, as_stored

_MEDIAN = math.sqrt(math.pi / 2)
"""How much wider than a mean's the spread of a median of normals is."""
Tree = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figure:
    """A number beside what the null expects of it and how far the null strays."""

    observed: float
    null: float = math.nan
    sd: float = math.nan

    @property
    def excess(self) -> float:
        """Observed - null."""
        return self.observed - self.null

    @property
    def z(self) -> float:
        """Excess in standard deviations; 0 where both agree to rounding, NaN where none is known."""
        if abs(self.excess) <= 1e-12 * max(1.0, abs(self.observed)):
            return 0.0
        return self.excess / self.sd if self.sd > 0 else math.nan


def summary(rows: Sequence[Row]) -> Tree:
    """``paper`` (bf16) and ``stored``, each with the same shape under null, excess and z.

    ``paper``, ``null``, ``excess`` and ``z`` are of bf16; ``stored`` holds its own four. Beside them
    the ways to count change, the tables by block, module type and layer, and what was left out.
    All are over tensors as stored, with spectra and masks of 2-D ones, as the paper's authors do; the
    tables are over the parts of fused tensors.
    """
    measured = [row for row in rows if row["status"] == "ok"]
    sound, parts = as_stored(measured), as_parts(measured)
    paper, stored = (figures(sound, precision) for precision in ("bf16", "stored"))
    told: Tree = {
        "paper": paper,
        "null": None,
        "excess": None,
        "z": None,
        "stored": {"observed": stored, "null": stored, "excess": stored, "z": stored},
        "change": {precision: change(sound, precision) for precision in ("bf16", "stored")},
        "visible_of_true": visible(sound),
        "s": spread(sound),
        "spectrum": spectrum(sound),
        "overlap_levels": overlap_levels(sound),
        **{key: _groups(parts, key) for key in ("block", "module", "layer")},
        "tensors": {"measured": len(sound), "left_out": _left_out(rows)},
    }
    for key, part in PARTS.items():
        told["paper" if key == "observed" else key] = plain(paper, part)
        told["stored"][key] = plain(stored, part)
    return plain(told, PARTS["observed"])


PARTS: dict[str, Callable[[Figure], float]] = {
    "observed": lambda figure: figure.observed,
    "null": lambda figure: figure.null,
    "excess": lambda figure: figure.excess,
    "z": lambda figure: figure.z,
}


def plain(tree: Any, part: Callable[[Figure], float]) -> Any:
    """One part of every figure; numbers that are none become None, as JSON has no NaN."""
    match tree:
        case dict():
            return {str(key): plain(value, part) for key, value in tree.items()}
        case list() | tuple():
            return [plain(value, part) for value in tree]
        case Figure():
            return plain(part(tree), part)
        case float():
            return tree if math.isfinite(tree) else None
    return tree


def figures(rows: Sequence[Row], precision: str) -> Tree:
    """The headline numbers of some tensors; spectral ones over matrices that changed."""
    views = [row[precision] | {"numel": row["numel"]} for row in rows]
    changed = [view for view in views if "spectrum" in view]
    n = sum(view["numel"] for view in views)
    energy = sum(view["energy"] for view in views)
    norm = _ratio(math.sqrt(energy), math.sqrt(sum(view["base_energy"] for view in views)))
    told: Tree = {
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
        told["overlap"] = _overlap(rows)
    return told


def _pooled(counts: list[tuple[float, float, float]], n: int) -> Figure:
    """Observed, mean and variance of counts, as a share of n."""
    if not n:
        return Figure(math.nan)
    seen, mean, variance = (sum(column) for column in zip(*counts, strict=True))
    return Figure(seen / n, mean / n, math.sqrt(variance) / n)


def _below(views: list[Tree], kind: str, key: str, n: int) -> Figure:
    return _pooled([(v[kind][key], *v["expected"][kind][key]) for v in views], n)


def _top(views: list[Tree], key: str, energy: float) -> Figure:
    moved = [view for view in views if view["energy"]]
    seen = sum(view["top"][key] for view in moved)
    null = sum(view["expected"]["top"][key] for view in moved)
    return Figure(_ratio(seen, energy), _ratio(null, energy))


def _spectral(views: list[Tree]) -> Tree:
    """Mean and median over matrices. The null of shares and ranks is Marchenko and Pastur's law."""
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
    """Mean and median over matrices, of what is known."""
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
    """Mean, median, and the mean weighted by each matrix' number of changed coordinates."""
    masks = [view["coverage"][share] for view in views]
    cells = [cells[mask][changed] for cells in masks if mask in cells]
    cells = [cell for cell in cells if cell["changed"]]
    found = averages([Figure(c["coverage"], c["null"], c["sd"]) for c in cells])
    total = sum(cell["changed"] for cell in cells)
    if not total:
        return found | {"update_weighted_mean": Figure(math.nan)}
    seen = sum(cell["inside"] for cell in cells) / total
    null = sum(cell["changed"] * cell["null"] for cell in cells) / total
    sd = math.sqrt(sum((cell["changed"] * cell["sd"]) ** 2 for cell in cells)) / total
    return found | {"update_weighted_mean": Figure(seen, null, sd)}


def _energy_share(rows: Sequence[Row], precision: str, block: str) -> Figure:
    """A block's share of the energy; its null is its share of the parameters."""
    mine = [row for row in rows if block_of_paper(row["name"]) == block]
    energy = sum(row[precision]["energy"] for row in rows)
    return Figure(
        _ratio(sum(row[precision]["energy"] for row in mine), energy),
        _ratio(sum(row["numel"] for row in mine), sum(row["numel"] for row in rows)),
    )


def _overlap(rows: Sequence[Row]) -> dict[str, Figure]:
    """At abs(D) > 1e-5. The null keeps each tensor's counts by binade; random_* keep densities only."""
    found = overlaps(list(rows), "1e-5")
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


def _share(seen: float, mean: float, sd: float, of: int) -> Figure:
    return Figure(_ratio(seen, of), _ratio(mean, of), _ratio(sd, of))


def _groups(rows: Sequence[Row], key: str) -> Tree:
    """By block, module type or layer: what an aggregate can hold, and energy beside parameters."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("outside" if row[key] is None else str(row[key]), []).append(row)
    energy = sum(row["bf16"]["energy"] for row in rows)
    n = sum(row["numel"] for row in rows)
    told: Tree = {}
    for name, mine in groups.items():
        share = _ratio(sum(row["bf16"]["energy"] for row in mine), energy)
        parameters = _ratio(sum(row["numel"] for row in mine), n)
        made = figures(mine, "bf16")
        told[name] = {
            "numel": sum(row["numel"] for row in mine),
            "parameter_share": parameters,
            "energy_share": share,
            "energy_per_parameter": _ratio(share, parameters),
            **{k: plain(made["sparsity"]["1e-5"], part) for k, part in PARTS.items()},
            "relative_norm": made["relative_norm"],
            "stable_rank": made["stable_rank"]["median"],
            "top_energy_16": made["top_energy"]["16"]["median"],
        }
    return told


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
