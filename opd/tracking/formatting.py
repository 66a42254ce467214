"""Numbers, durations and metric names as people read them."""

import math
from collections.abc import Iterable


def number(value: float | None) -> str:
    """Four digits in at most 7 characters and a sign; "-" for none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    if size >= 1e5 or size < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(max(size, 0.1))))}f}"


def duration(seconds: float) -> str:
    """``41 s``, ``2 min 5 s``, ``3 h 20 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def evaluation_tasks(metrics: Iterable[str]) -> list[str]:
    """The tasks in metric names ``eval/<task>/<metric>``, in the order of first appearance."""
    parts = (name.split("/") for name in metrics)
    return list(dict.fromkeys(p[1] for p in parts if p[0] == "eval" and len(p) == 3))
