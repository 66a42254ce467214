"""PNG figures of an analysis: heat maps, spectra, sparsity, placement, overlap."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure

from opd.analysis.counts import THRESHOLDS
from opd.analysis.measure import RANK_KEYS, THRESHOLD_KEYS
from opd.analysis.rows import Row
from opd.mask.compare import LEVELS, Overlap
from opd.plain_text import figure_text

INK, GRID, OBSERVED, NULL = "#333333", "#dddddd", "#2563eb", "#d9600b"
LEVEL_LABELS = {
    "global": "same densities",
    "tensor": "same counts in each tensor",
    "binade": "same counts in each tensor and binade",
}
_LEVEL_STYLES = {
    "global": ("#e45756", -0.2),
    "tensor": ("#f2b701", 0.0),
    "binade": ("#222222", 0.2),
}
_SETTINGS: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "legend.frameon": False,
}
_DPI = 130


def save_figure(
    path: Path, size: tuple[float, float], panels: int, draw: Callable[[list[Axes], Figure], None]
) -> Path:
    """Draw panels side by side and write them to ``path``; ``size`` in inches."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=size, layout="constrained", dpi=_DPI)
        draw(list(figure.subplots(1, panels, squeeze=False)[0]), figure)
        figure.savefig(path)
    return path


def heat_map(
    rows: Sequence[Row],
    value: Callable[[Row], float],
    label: str,
    path: Path,
    around: float | None = None,
) -> Path:
    """A value for each module type in each layer; only of matrices inside the layers.

    ``around``: the centre of a diverging colour map.
    """
    cells: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if row["layer"] is not None and len(row["shape"]) == 2:
            cells.setdefault((row["layer"], row["module"]), []).append(value(row))
    layers = sorted({layer for layer, _ in cells}) or [0]
    order = {row["module"]: (row["block"], row["module"]) for row in rows}
    modules = sorted({module for _, module in cells}, key=lambda m: order[m]) or ["none"]
    grid = np.full((len(layers), len(modules)), np.nan)
    for (layer, module), values in cells.items():
        known = [v for v in values if np.isfinite(v)]
        if known:
            grid[layers.index(layer), modules.index(module)] = np.mean(known)

    def draw(axes: list[Axes], figure: Figure) -> None:
        masked = np.ma.masked_invalid(grid)
        image = axes[0].imshow(masked, aspect="auto", cmap="viridis")
        if around is not None:
            image.set(cmap="RdBu_r", norm=CenteredNorm(around))
        axes[0].set_xticks(
            range(len(modules)), [*map(figure_text, modules)], rotation=35, ha="right"
        )
        step = max(1, len(layers) // 16)
        axes[0].set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        axes[0].set(xlabel="module type", ylabel="layer")
        axes[0].spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes[0], shrink=0.9)
        bar.set_label(label)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]

    return save_figure(path, (2.6 + 0.62 * len(modules), 2.2 + 0.16 * len(layers)), 1, draw)


def sparsity(found: dict[str, Any], path: Path) -> Path:
    """Share of weights with abs(D) below each threshold, beside the null, in bf16 and as stored."""

    def draw(axes: list[Axes], figure: Figure) -> None:
        for panel, title, parts in (
            (axes[0], "bf16, as in the paper", (found["paper"], found["null"])),
            (axes[1], "as stored", (found["stored"]["observed"], found["stored"]["null"])),
        ):
            for part, label, style in zip(
                parts, ("observed", "null"), ((OBSERVED, "-", "o"), (NULL, "--", "s")), strict=True
            ):
                shares = [100 * (part["sparsity"][key] or 0) for key in THRESHOLD_KEYS]
                panel.plot(
                    THRESHOLDS, shares, color=style[0], ls=style[1], marker=style[2], label=label
                )
            panel.set(xscale="log", ylim=(0, 102), xlabel="threshold e", title=title)
            panel.grid(axis="y", color=GRID, linewidth=0.6)
        axes[0].set_ylabel("weights with abs(D) < e, %")
        axes[0].legend()

    return save_figure(path, (7.6, 3.0), 2, draw)


def spectra(rows: Sequence[Row], path: Path) -> Path:
    """Spectra of the most, the median and the least concentrated update of a matrix."""
    known = [row for row in rows if "spectrum" in row["bf16"]]
    ranked = sorted(known, key=lambda row: row["bf16"]["spectrum"]["stable_rank"])
    chosen = [ranked[0], ranked[len(ranked) // 2], ranked[-1]] if ranked else []

    def draw(axes: list[Axes], figure: Figure) -> None:
        for panel, row in zip(axes, chosen, strict=True):
            spectrum = row["bf16"]["spectrum"]
            curve = spectrum["curve"]
            panel.plot(curve["rank"], curve["update"], color=OBSERVED, label="update D")
            for edge, style, label in (
                ("isotropic_edge", "--", "edge of an isotropic update of this norm"),
                ("noise_edge", ":", "edge of the rounding noise"),
            ):
                panel.axhline(spectrum[edge], color=NULL, ls=style, label=label)
            top = max(curve["update"][0], spectrum["isotropic_edge"])
            panel.set(xscale="log", yscale="log", xlabel="rank", ylim=(top * 2e-3, top * 1.6))
            name = row["name"].removesuffix(".weight").removeprefix("model.")
            panel.set_title(
                f"{figure_text(name)}\nstable rank {spectrum['stable_rank']:.3g}", fontsize=8.5
            )
            panel.grid(color=GRID, linewidth=0.5)
        axes[0].set_ylabel("singular value")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    return save_figure(path, (8.4, 3.3), max(1, len(chosen)), draw)


def near_zero(rows: Sequence[Row], found: dict[str, Any], path: Path) -> Path:
    """Share of changed weights by their magnitude; coverage of low-magnitude and principal masks."""
    sums: dict[int, np.ndarray] = {}
    for row in rows:
        table = row["bf16"]["binades"]
        chances = row["bf16"]["expected"]["changed_by_binade"]
        for bin, n, changed, chance in zip(
            table["bin"], table["counts"][0], table["counts"][1], chances, strict=True
        ):
            sums[bin] = sums.get(bin, np.zeros(3)) + np.array([n, changed, n * chance])
    bins = [bin for bin in sorted(sums) if bin > 1 and sums[bin][0] >= 50]

    def draw(axes: list[Axes], figure: Figure) -> None:
        size = [2.0 ** (bin - 128) for bin in bins]
        for column, style, label in ((1, (OBSERVED, "-"), "observed"), (2, (NULL, "--"), "null")):
            share = [100 * sums[bin][column] / sums[bin][0] for bin in bins]
            axes[0].plot(size, share, color=style[0], ls=style[1], label=label)
        axes[0].set(xscale="log", xlabel="size of the weight, abs(w)", ylabel="changed weights, %")
        axes[0].set_ylim(0, 103)
        axes[0].legend()
        axes[0].grid(axis="y", color=GRID, linewidth=0.6)
        density = np.array([float(key.removesuffix("%")) for key in RANK_KEYS])
        positions = np.arange(len(RANK_KEYS))
        for offset, mask, label, colour in (
            (-0.2, "low_magnitude", "smallest weights", OBSERVED),
            (0.2, "principal", "principal weights", "#93b4f5"),
        ):
            cells = [
                [found[p]["coverage"][mask][r]["1e-5"]["mean"] for r in RANK_KEYS]
                for p in ("paper", "null")
            ]
            if None in (*cells[0], *cells[1]):
                continue
            observed, null = (100 * np.array(c) / density for c in cells)
            axes[1].bar(positions + offset, observed, width=0.36, color=colour, label=label)
            axes[1].scatter(
                positions + offset,
                null,
                marker="_",
                s=260,
                color=NULL,
                zorder=3,
                label="null" if offset < 0 else None,
            )
        axes[1].axhline(1, color=INK, linewidth=0.8, ls=":")
        axes[1].set_xticks(positions, RANK_KEYS)
        axes[1].set(xlabel="size of the mask", ylabel="changes, times the mask's density")
        top = axes[1].get_ylim()[1]
        axes[1].set_ylim(0, 1.3 * top)
        if axes[1].containers:
            axes[1].legend(loc="upper left", ncols=3, columnspacing=1.0, handlelength=1.4)

    return save_figure(path, (8.4, 3.2), 2, draw)


def overlap_bars(bars: Sequence[Overlap], path: Path) -> Path:
    """Share of A's changes that B made too, by group, with chance at three levels."""

    def draw(axes: list[Axes], figure: Figure) -> None:
        positions = np.arange(len(bars))
        observed = [100 * bar.coverage_of_a for bar in bars]
        axes[0].barh(
            positions, np.nan_to_num(observed), height=0.62, color=OBSERVED, label="observed"
        )
        for level in LEVELS:
            colour, height = _LEVEL_STYLES[level]
            chance = [100 * bar.expected[level].mean / bar.a if bar.a else np.nan for bar in bars]
            axes[0].scatter(
                chance,
                positions + height,
                s=34,
                color=colour,
                edgecolor="white",
                linewidth=0.7,
                zorder=3,
                label=f"chance: {LEVEL_LABELS[level]}",
            )
        axes[0].set_yticks(positions, [figure_text(bar.name) for bar in bars])
        axes[0].invert_yaxis()
        axes[0].set_xlim(left=0)
        axes[0].grid(axis="x", color=GRID, linewidth=0.6)
        axes[0].set_axisbelow(True)
        axes[0].set_xlabel("share of A's changed weights that B changed too, %")
        figure.legend(loc="outside lower center", ncols=2)

    return save_figure(path, (7.4, 1.9 + 0.3 * len(bars)), 1, draw)
