"""The headline numbers in words, and numbers as people read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure of the summary: its name, where it lies, and how it is written."""

    name: str
    path: tuple[str, ...]
    unit: str


HEADLINES = (
    Headline("relative norm |D| / |W0|", ("relative_norm",), "%"),
    Headline("exactly unchanged", ("exact_zero",), "%"),
    Headline("sparsity, abs(D) < 1e-5", ("sparsity", "1e-5"), "%"),
    Headline("energy in the top 1 % of the weights", ("coordinate_energy", "1%"), "%"),
    Headline("energy in 16 directions, mean", ("top_energy", "16", "mean"), "%"),
    Headline("stable rank, median", ("stable_rank", "median"), ""),
    Headline("effective rank, median", ("effective_rank", "median"), ""),
    Headline("principal projection at 10 %, mean", ("principal_projection", "10%", "mean"), "%"),
    Headline("drift of singular values, mean", ("spectral_drift", "mean"), "%"),
    Headline(
        "changes in the principal 10 %, mean", ("coverage", "principal", "10%", "1e-5", "mean"), "%"
    ),
    Headline(
        "changes in the smallest 10 %, mean",
        ("coverage", "low_magnitude", "10%", "1e-5", "mean"),
        "%",
    ),
    Headline("share of energy in FFN", ("energy_share", "ffn"), "%"),
    Headline("share of energy in attention", ("energy_share", "attention"), "%"),
    Headline("A's changes that B made too", ("overlap", "a_covered_by_b"), "%"),
    Headline("B's changes that A made too", ("overlap", "b_covered_by_a"), "%"),
)


def at(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The number at a path, None where there is none."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def shown(value: float | None, unit: str) -> str:
    """``82.6 %``, ``+3.1`` for a z, four digits otherwise; a dash for what is unknown."""
    if value is None:
        return "-"
    if unit == "%":
        return f"{100 * value:.4g} %"
    return f"{value:+.1f}" if unit == "z" else f"{value:.4g}"
