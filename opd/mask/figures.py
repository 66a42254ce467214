"""PNG figures of masks: a heat map of density, bars of overlap, accuracy after reverting changes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from opd.mask.compare import MaskComparison, Overlap
from opd.mask.describe import Description
from opd.plain_text import figure_text

CURVE_COLOURS = ("#4c78a8", "#e45756", "#7a7a7a")
INK, GRID, OBSERVED = "#333333", "#dddddd", "#4c78a8"
LEVEL_STYLES = {"global": (-0.2, "#e45756"), "tensor": (0.0, "#f2b701"), "binade": (0.2, "#222222")}
"""Vertical offset and colour of each level of chance."""
LEVEL_LABELS = {
    "global": "chance: same densities",
    "tensor": "chance: same counts per tensor",
    "binade": "chance: same counts per tensor and binade",
}
_SETTINGS = {
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
}
_DPI = 130


def heat_map(description: Description, title: str, path: Path) -> None:
    """Density of each module type in each layer.

    ValueError when the model has no numbered layers.
    """
    if not description.cells:
        raise ValueError("the mask's model has no numbered layers to draw a heat map of")
    layers = sorted({layer for layer, _ in description.cells})
    modules = [
        s.name for s in description.modules if any(s.name == m for _, m in description.cells)
    ]
    grid = np.full((len(layers), len(modules)), np.nan)
    for (layer, module), share in description.cells.items():
        grid[layers.index(layer), modules.index(module)] = 100 * share.density
    with matplotlib.rc_context(_SETTINGS):  # pyright: ignore[reportArgumentType]
        size = (2.6 + 0.62 * len(modules), 2.0 + 0.19 * len(layers))
        figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
        axes = figure.add_subplot()
        top = max(float(np.nanmax(grid)), 1e-9)
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set_xticks(range(len(modules)), [*map(figure_text, modules)], rotation=40, ha="right")
        step = max(1, len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        axes.set_xlabel("module type")
        axes.set_ylabel("layer")
        axes.set_title(figure_text(f"{title}\n{_subtitle(description)}"), fontsize=9)
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, shrink=0.8)
        bar.set_label("kept weights, %")
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def _subtitle(description: Description) -> str:
    """Densities that the heat map does not show: the whole model and modules outside the layers."""
    inside = {module for _, module in description.cells}
    outside = [s for s in description.modules if s.name not in inside]
    parts = [f"whole model {100 * description.whole.density:.3g} %"]
    return ", ".join([*parts, *(f"{s.name} {100 * s.density:.3g} %" for s in outside)])


def overlap_bars(comparison: MaskComparison, names: tuple[str, str], path: Path) -> None:
    """Coverage of A by B for the whole model and each module type, with chance as dots on each bar."""
    rows: Sequence[Overlap] = [
        comparison.whole,
        *sorted(comparison.modules, key=lambda m: -m.numel),
    ]
    with matplotlib.rc_context(_SETTINGS):  # pyright: ignore[reportArgumentType]
        size = (7.2, 1.9 + 0.3 * len(rows))
        figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
        axes = figure.add_subplot()
        positions = np.arange(len(rows))
        observed = [100 * row.coverage_of_a for row in rows]
        axes.barh(positions, np.nan_to_num(observed), height=0.62, color=OBSERVED, label="observed")
        for level in comparison.whole.expected:
            height, colour = LEVEL_STYLES[level]
            chance = [100 * row.expected[level].mean / row.a if row.a else np.nan for row in rows]
            style = {"color": colour, "edgecolor": "white", "linewidth": 0.7, "zorder": 3}
            axes.scatter(chance, positions + height, s=34, label=LEVEL_LABELS[level], **style)
        axes.set_yticks(positions, [figure_text(row.name) for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("share of A's weights that B also keeps, %")
        axes.set_title(figure_text(f"A = {names[0]}\nB = {names[1]}"), fontsize=9)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def prune_curve(
    curves: Mapping[str, Sequence[Mapping[str, float]]], moved: int, path: Path
) -> None:
    """Accuracy against the share of reverted changes, a curve for each order, with intervals."""
    with matplotlib.rc_context(_SETTINGS):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(6.2, 3.9), layout="constrained", dpi=_DPI)
        axes = figure.add_subplot()
        for (order, points), colour in zip(curves.items(), CURVE_COLOURS, strict=False):
            shares = [100 * point["share"] for point in points]
            low, high = ([100 * point[end] for point in points] for end in ("low", "high"))
            accuracies = [100 * point["accuracy"] for point in points]
            axes.fill_between(shares, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                shares, accuracies, color=colour, marker="o", markersize=4, label=f"{order} first"
            )
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_ylim(bottom=0)
        axes.set_xlabel(f"changes reverted, % of {moved:,}")
        axes.set_ylabel("accuracy, %")
        axes.set_title("shaded: 95 % Wilson intervals over the prompts", fontsize=9)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
