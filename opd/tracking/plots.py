"""Curves as inline SVG whose colours are CSS variables of the page, for light and dark themes."""

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

NEUTRAL = 10
"""The colour of lines that belong to no run: the page defines --c0 to --c9 and this one, --c10."""

# matplotlib draws in placeholder colours, which are then replaced by the variables of the page.
_SERIES = "#fe00{:02x}"
_INK, _GRID = "#fe01aa", "#fe01bb"
_STYLES = {"solid": "-", "dashed": (0, (5, 3)), "dotted": (0, (1.5, 2))}
_MANY_POINTS = 40

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "opd",
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.formatter.useoffset": False,
}

Style = Literal["solid", "dashed", "dotted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve, or with a single y a horizontal line; ``marked`` draws a marker at each point."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    colour: int = 0
    style: Style = "solid"
    marked: bool = False

    @property
    def is_level(self) -> bool:
        """A horizontal line: one y and no x."""
        return not self.xs


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One plot; ``stacked`` draws the lines as stacked areas."""

    title: str
    lines: list[Line]
    note: str = ""
    x_label: str = "step"
    y_range: tuple[float, float] | None = None
    wide: bool = False
    stacked: bool = False

    @property
    def svg(self) -> str:
        """The plot as an <svg> element without width and height."""
        with matplotlib.rc_context(_SETTINGS):  # pyright: ignore[reportArgumentType]
            figure = Figure(figsize=(6.6, 3.1) if self.wide else (4.4, 2.5), layout="constrained")
            axes = figure.add_subplot()
            if self.stacked:
                _draw_stack(axes, self.lines)
            else:
                for line in self.lines:
                    _draw(axes, line)
                _scale(axes, self.lines, self.y_range)
            axes.set_xlabel(self.x_label)
            axes.grid(axis="x", visible=False)
            axes.set_axisbelow(True)
            text = io.StringIO()
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        return _inline_svg(text.getvalue(), self.title)


def _colour(index: int) -> str:
    return _SERIES.format(index)


def _draw(axes: Axes, line: Line) -> None:
    drawn: dict[str, Any] = {"color": _colour(line.colour), "linestyle": _STYLES[line.style]}
    if line.is_level:
        axes.axhline(line.ys[0], linewidth=1.3, **drawn)
        return
    noisy = not line.marked and is_noisy(line.ys)
    if noisy:
        axes.plot(line.xs, line.ys, linewidth=0.7, alpha=0.3, **drawn)
    few = line.marked or len(line.xs) == 1
    axes.plot(
        line.xs,
        smooth(line.ys) if noisy else line.ys,
        linewidth=1.8,
        marker="o" if few else "",
        markersize=4,
        solid_capstyle="round",
        **drawn,
    )


def _draw_stack(axes: Axes, lines: Sequence[Line]) -> None:
    heights = [smooth(line.ys) if is_noisy(line.ys) else line.ys for line in lines]
    axes.stackplot(
        lines[0].xs,
        *np.nan_to_num(np.asarray(heights, dtype=float)),
        colors=[_colour(line.colour) for line in lines],
        alpha=0.85,
        linewidth=0,
    )
    axes.margins(x=0)
    axes.set_ylim(bottom=0)


def _scale(axes: Axes, lines: Sequence[Line], y_range: tuple[float, float] | None) -> None:
    """The given range; without one, a logarithmic axis where values span more than two decades."""
    if y_range is not None:
        axes.set_ylim(*y_range)
        return
    ys = np.concatenate([np.asarray(line.ys, dtype=float) for line in lines])
    ys = ys[np.isfinite(ys)]
    if len(ys) and ys.min() > 0 and ys.max() / ys.min() > 100:
        axes.set_yscale("log")
        return
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
    if len(ys) and 0 <= ys.min() < 0.5 * ys.max():
        axes.set_ylim(bottom=0)


def _tick(value: float) -> str:
    """``0.02``, ``150``, ``1.6M``: labels without a common factor in the corner of the plot."""
    if abs(value) < 1e4:
        return f"{value:.6g}"
    return EngFormatter(sep="").format_eng(value)


def is_noisy(values: Sequence[float]) -> bool:
    """Whether there are many points and their total variation is more than three times their range."""
    ys = np.asarray(values, dtype=float)
    ys = ys[np.isfinite(ys)]
    return len(ys) > _MANY_POINTS and float(np.abs(np.diff(ys)).sum()) > 3 * float(np.ptp(ys))


def smooth(values: Sequence[float]) -> list[float]:
    """Centred moving mean over a twentieth of the curve; at the ends over fewer points."""
    half = max(1, len(values) // 40)
    ys = np.asarray(values, dtype=float)
    known = np.isfinite(ys)
    kernel = np.ones(2 * half + 1)
    total = np.convolve(np.where(known, ys, 0.0), kernel, mode="same")
    count = np.convolve(known.astype(float), kernel, mode="same")
    return np.where(known, total / np.maximum(count, 1), np.nan).tolist()


def _inline_svg(svg: str, title: str) -> str:
    """An SVG file as an element that can be put into a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(title)}"', 1)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick)[^"]*"', "", svg)
    svg = re.sub(r"#fe00([0-9a-f]{2})", lambda match: f"var(--c{int(match[1], 16)})", svg)
    return svg.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)").strip()
