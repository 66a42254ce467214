"""The parts of a summary besides its headline figures: ways to count change, overlap beside chance."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from opd.analysis.measure import CHANGED_KEYS, THRESHOLD_KEYS
from opd.analysis.overlap import pool_overlap
from opd.analysis.rows import Row

Tree = dict[str, Any]


def summarize_overlap(rows: Sequence[Row]) -> Tree | None:
    """Observed overlap / expected overlap, and z, at three levels of chance; None without other=."""
    levels: Tree = {}
    for changed in CHANGED_KEYS:
        found = pool_overlap(list(rows), changed)
        if found is None:
            return None
        levels[changed] = {
            "a": found.a,
            "b": found.b,
            "both": found.both,
            **{
                level: {
                    "expected": found.expected[level].mean,
                    "lift": found.lift(level),
                    "z": found.z(level),
                }
                for level in found.expected
            },
        }
    return levels


def summarize_change(rows: Sequence[Row], precision: str) -> Tree:
    """Five ways to count change, as shares of all weights; the last is a histogram of spacings moved."""
    n = sum(row["numel"] for row in rows)
    views = [row[precision] for row in rows]
    return {
        "bitwise": _ratio(sum(v["bitwise"] for v in views), n),
        "nonzero": 1 - _ratio(sum(v["zero"] for v in views), n),
        "relative_rule": _ratio(sum(v["rule"] for v in views), n),
        "above": {k: 1 - _ratio(sum(v["below"][k] for v in views), n) for k in THRESHOLD_KEYS},
        "spacings_moved": {
            _bucket(i): _ratio(sum(v["ulps"][i] for v in views), n)
            for i in range(len(views[0]["ulps"]) if views else 0)
        },
    }


def _bucket(index: int) -> str:
    if index < 3:
        return str(index)
    return f"{2 ** (index - 2) + 1}-{2 ** (index - 1)}"


def summarize_visible(rows: Sequence[Row]) -> Tree | None:
    """Energy of the bf16-visible update / the true one, and their cosine; None without a true one."""
    known = [row for row in rows if row["visible"]]
    cosines = [row["visible"]["cosine"] for row in known]
    cosines = [cosine for cosine in cosines if math.isfinite(cosine)]
    if not cosines:
        return None
    ratio = _ratio(
        sum(row["bf16"]["energy"] for row in known), sum(row["stored"]["energy"] for row in known)
    )
    return {
        "energy_ratio": ratio,
        "cosine": {"mean": statistics.fmean(cosines), "median": statistics.median(cosines)},
    }


def summarize_spectrum(rows: Sequence[Row]) -> Tree:
    """The method behind the spectra; for ``fast``, error bounds of the summary's figures."""
    found = [row["bf16"]["spectrum"] for row in rows if "spectrum" in row["bf16"]]
    bounds = [each["bound"] for each in found if "bound" in each]
    if not bounds:
        return {"method": "exact", "bounds": {}}
    columns = {key: [bound[key] for bound in bounds] for key in bounds[0]}
    return {
        "method": "fast",
        "bounds": {
            key: {"mean": statistics.fmean(column), "median": max(column)}
            for key, column in columns.items()
        },
    }


def summarize_null_spread(rows: Sequence[Row]) -> Tree:
    """Median standard deviation of the null's update over tensors that changed, and its source."""
    nulls = [row["bf16"]["null"] for row in rows if row["bf16"]["null"]["s"] > 0]
    return {
        "median": statistics.median([null["s"] for null in nulls]) if nulls else math.nan,
        "from": sorted({null["s_from"] for null in nulls}),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
