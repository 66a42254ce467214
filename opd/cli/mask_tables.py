"""The output of ``opd mask``: tables to read, JSON for scripts."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from opd.checkpoint.names import place
from opd.mask.compare import LEVELS, MaskComparison, Overlap
from opd.mask.describe import Description, Share
from opd.mask.discover import Summary
from opd.mask.mask import Mask

EXTREMES = 5
CHANCE = {
    "global": "chance: both densities",
    "tensor": "chance: counts per tensor",
    "binade": "chance: and per binade",
}


def discovery_table(summary: Summary) -> Table:
    """The weights that a discovered mask keeps, by block."""
    table = _table(str(summary.path), "", "weights kept", "density")
    blocks: dict[str, int] = {}
    for name, kept in summary.counts.items():
        block = place(name).block
        blocks[block] = blocks.get(block, 0) + kept
    for block, kept in blocks.items():
        table.add_row(block, f"{kept:,}", f"{kept / summary.numel:.4%} of all")
    table.add_section()
    table.add_row("all", f"{summary.kept:,}", f"{summary.density:.4%}")
    if summary.tied:
        table.caption = (
            f"{summary.tied:,} scores equal a threshold,\n"
            f"{summary.tied_kept:,} of them kept at random"
        )
        table.caption_justify = "left"
    return table


def description_tables(mask: Mask, description: Description) -> Iterator[Table]:
    """The origin of a mask and its density by block, module type, layer and tensor."""
    origin, whole = mask.origin, description.whole
    head = _table("Mask", "", "", right=False)
    for name, value in (
        ("rule", origin.rule),
        ("base", f"{origin.model} (fingerprint {origin.base[:12]})"),
        ("seed", str(origin.seed)),
        ("command", origin.command),
        ("kept", f"{whole.kept:,} of {whole.numel:,} weights: {whole.density:.4%}"),
    ):
        head.add_row(name, value)
    yield head
    for title, shares in (
        ("Blocks", description.blocks),
        ("Module types", description.modules),
        ("Layers", description.layers),
    ):
        yield _share_table(title, shares, whole)
    ranked = sorted(description.tensors, key=lambda share: -share.density)
    for title, extremes in (("Densest", ranked[:EXTREMES]), ("Sparsest", ranked[-EXTREMES:])):
        table = _table(f"{title} tensors", "", "density", "kept")
        for share in extremes:
            table.add_row(share.name, f"{share.density:.3%}", f"{share.kept:,}")
        yield table


def _share_table(title: str, shares: Any, whole: Share) -> Table:
    table = _table(title, "", "density", "x model's", "kept", "of all\nkept", "of all\nweights")
    for share in shares:
        relative = share.density / whole.density if whole.density else math.nan
        table.add_row(
            share.name,
            f"{share.density:.3%}",
            f"{relative:.2f}",
            f"{share.kept:,}",
            f"{share.kept / max(whole.kept, 1):.1%}",
            f"{share.numel / whole.numel:.1%}",
        )
    return table


def description_json(mask: Mask, description: Description) -> dict[str, Any]:
    """The numbers of ``description_tables``."""

    def as_dict(shares: tuple[Share, ...]) -> dict[str, Any]:
        return {s.name: {"kept": s.kept, "numel": s.numel, "density": s.density} for s in shares}

    return {
        "origin": asdict(mask.origin),
        "kept": description.whole.kept,
        "numel": description.whole.numel,
        "density": description.whole.density,
        "blocks": as_dict(description.blocks),
        "modules": as_dict(description.modules),
        "layers": as_dict(description.layers),
        "tensors": as_dict(description.tensors),
    }


def comparison_tables(comparison: MaskComparison, names: tuple[str, str]) -> Iterator[Table]:
    """Observed overlap beside chance, for the whole model and by module type."""
    whole = comparison.whole
    levels = [level for level in LEVELS if level in whole.expected]
    title = f"A = {names[0]}: {whole.a:,}\nB = {names[1]}: {whole.b:,}\nboth: {whole.both:,}"
    table = _table(title, "", "A covered\nby B", "B covered\nby A", "Jaccard", "lift", "z")
    table.add_row(
        Text("observed", style="bold"),
        *(_cell(v, ".2%") for v in (whole.coverage_of_a, whole.coverage_of_b, whole.jaccard)),
        "",
        "",
    )
    for level in levels:
        mean = whole.expected[level].mean
        table.add_row(
            CHANCE[level],
            f"{mean / max(whole.a, 1):.2%}",
            f"{mean / max(whole.b, 1):.2%}",
            _cell(whole.expected_jaccard(level), ".2%"),
            _cell(whole.lift(level), ".3f"),
            _cell(whole.z(level), "+,.1f"),
        )
    if "binade" not in levels:
        table.caption = "base=MODEL adds chance that keeps the magnitudes of the weights"
        table.caption_justify = "left"
    yield table
    # chance at both densities adds nothing to chance per tensor within a module type
    detailed = [level for level in levels if level != "global"]
    lifts = [f"lift\n{level}" for level in detailed]
    headings = ("A\nkeeps", "B\nkeeps", "A's\nin B", "B's\nin A", *lifts, "z")
    detail = _table("Module types", "", *headings)
    for row in comparison.modules:
        detail.add_row(*_module_row(row, detailed))
    yield detail


def _module_row(row: Overlap, levels: list[str]) -> list[str]:
    return [
        row.name,
        f"{row.a / row.numel:.1%}",
        f"{row.b / row.numel:.1%}",
        _cell(row.coverage_of_a, ".1%"),
        _cell(row.coverage_of_b, ".1%"),
        *(_cell(row.lift(level), ".3f") for level in levels),
        _cell(row.z(levels[-1]), "+,.1f"),
    ]


def _cell(value: float, style: str) -> str:
    return "-" if math.isnan(value) else format(value, style)


def comparison_json(comparison: MaskComparison) -> dict[str, Any]:
    """The numbers of ``comparison_tables``; undefined ones are None."""

    def as_dict(row: Overlap) -> dict[str, Any]:
        return {
            "numel": row.numel,
            "a": row.a,
            "b": row.b,
            "both": row.both,
            "coverage_of_a": _none_if_nan(row.coverage_of_a),
            "coverage_of_b": _none_if_nan(row.coverage_of_b),
            "jaccard": _none_if_nan(row.jaccard),
            "chance": {
                level: {
                    "both": row.expected[level].mean,
                    "jaccard": _none_if_nan(row.expected_jaccard(level)),
                    "lift": _none_if_nan(row.lift(level)),
                    "z": _none_if_nan(row.z(level)),
                }
                for level in row.expected
            },
        }

    return {
        "whole": as_dict(comparison.whole),
        "modules": {row.name: as_dict(row) for row in comparison.modules},
    }


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _table(title: str, *headings: str, right: bool = True) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for number, heading in enumerate(headings):
        justify = "right" if right and number else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=right)
    return table
