"""Headline figures in sentences, and numbers formatted for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Spectrum(StrEnum):
    """``fast``: only the leading singular values of updates, between bounds."""

    exact = "exact"
    fast = "fast"


@dataclass(frozen=True, slots=True)
class Headline:
    """A figure of the summary: its name, its path and its unit."""

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


def lookup(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The number at a path, or None."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node


def format_value(value: float | None, unit: str) -> str:
    """``82.6 %``, ``+3.1`` for a z, four digits otherwise; a dash for None."""
    if value is None:
        return "-"
    if unit == "%":
        return f"{100 * value:.4g} %"
    return f"{value:+.1f}" if unit == "z" else f"{value:.4g}"


def interpret(found: Mapping[str, Any]) -> list[str]:
    """The headline figures in sentences, for readers who are new to them."""
    sentences = []
    sparse = [lookup(found[p], ("sparsity", "1e-5")) for p in ("paper", "null")]
    if None not in sparse:
        sentences.append(
            f"In bf16 {format_value(sparse[0], '%')} of the weights look unchanged; an update of the same "
            f"norm without any structure would show {format_value(sparse[1], '%')}."
        )
    sentences += _bounds(found["spectrum"])
    rank = [lookup(found[p], ("stable_rank", "median")) for p in ("paper", "null")]
    if None not in rank:
        lower = rank[0] < 0.8 * rank[1]
        sentences.append(
            f"The update of a typical matrix spreads over {format_value(rank[0], '')} directions (stable "
            f"rank), a random one over {format_value(rank[1], '')}: "
            + ("it is concentrated beyond chance." if lower else "that is no concentration.")
        )
    path = ("coverage", "low_magnitude", "10%", "1e-5", "mean")
    small = [lookup(found[p], path) for p in ("paper", "null", "z")]
    if None not in small:
        beyond = "more than" if small[2] > 3 else "less than" if small[2] < -3 else "in line with"
        sentences.append(
            f"{format_value(small[0], '%')} of the changes fall on the smallest tenth of the weights, "
            f"{beyond} the {format_value(small[1], '%')} that rounding alone leads to "
            f"(z = {format_value(small[2], 'z')})."
        )
    overlap = [lookup(found[p], ("overlap", "a_covered_by_b")) for p in ("paper", "null", "z")]
    if None not in overlap:
        sentences.append(
            f"{format_value(overlap[0], '%')} of the first model's changes were made by the second too; "
            f"chance at equal counts in every binade gives {format_value(overlap[1], '%')} "
            f"(z = {format_value(overlap[2], 'z')})."
        )
    return sentences


def _bounds(spectrum: Mapping[str, Any]) -> list[str]:
    """The error bounds of ``spectrum=fast``, in a sentence."""
    if spectrum["method"] != Spectrum.fast or not spectrum["bounds"]:
        return []
    energy, rank = (spectrum["bounds"][key] for key in ("energy_16", "stable_rank"))
    return [
        "Spectra are leading singular values between bounds (spectrum=fast): the mean energy in 16 "
        f"directions may be up to {format_value(energy['mean'], '%')} higher, the median stable rank up to "
        f"{format_value(rank['median'], '')} lower. Effective and numerical rank, drift, projection, "
        "rotation and principal masks need whole spectra and are left out."
    ]
