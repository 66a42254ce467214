"""The panels of a run with record=weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opd.tracking.plots import NEUTRAL, Line, Panel

_BLOCKS = ("attention", "ffn")
Row = Mapping[str, Any]


def weight_panels(rows: Sequence[Row]) -> list[Panel]:
    """A panel for each quantity over the recorded steps; a quantity without values has none."""
    panels = [
        Panel(
            title="Weights that look unchanged",
            note="share of all weights, compared with the start; fp32: master weights, bf16: as they run",
            lines=_known(
                _line(rows, "bf16, bitwise", 0, lambda r: r["all"]["bf16"]["exact_zero"]),
                _line(rows, "bf16, |D| up to 1e-5", 1, lambda r: r["all"]["bf16"]["1e-05"]),
                _line(rows, "fp32, bitwise", 2, lambda r: r["all"]["fp32"]["exact_zero"]),
            ),
            y_range=(0.0, 1.04),
            wide=True,
        ),
        Panel(
            title="Never, cancelled, final",
            note="bf16 value never changed in a recording; changed and changed back; differs now",
            lines=_stack(rows, ("final", "cancelled", "never"), lambda r, name: r["all"][name]),
            stacked=True,
            wide=True,
        ),
        Panel(
            title="Size of the changes",
            note="distance from the start in bf16 steps (ulp); share of all weights",
            lines=_stack(rows, _bins(rows), lambda r, name: r["all"]["ulps"][name]),
            stacked=True,
            wide=True,
        ),
        _ranks(rows),
        Panel(
            title="One Adam step, with its gradient and with a zero gradient",
            note="share of weights that change in bf16; with a zero gradient only momentum moves them",
            lines=_known(
                _line(rows, "the step", 0, lambda r: _adam(r, "step_visible")),
                _line(rows, "gradient zero", 1, lambda r: _adam(r, "zero_gradient_visible")),
            ),
            wide=True,
        ),
        _directions(rows),
        Panel(
            title="Adam's moments",
            note="",
            lines=_known(
                _line(rows, "variation of √v", 0, lambda r: _adam(r, "root_v_variation")),
                _line(rows, "cosine of m and g", 1, lambda r: _adam(r, "cosine_m_g")),
            ),
            wide=True,
        ),
        Panel(
            title="Distance from the start",
            note="‖D‖ / ‖W0‖",
            lines=_known(
                _line(rows, "fp32", 0, lambda r: r["all"]["fp32"]["relative_norm"]),
                _line(rows, "bf16", 1, lambda r: r["all"]["bf16"]["relative_norm"]),
            ),
            wide=True,
        ),
    ]
    return [panel for panel in panels if panel.lines]


def _ranks(rows: Sequence[Row]) -> Panel:
    def rank(stats: Any, precision: str) -> float | None:
        found = stats[precision]["stable_rank"]
        return found["mean"] if found else None

    lines = [
        _line(rows, "all, fp32", 0, lambda r: rank(r["all"], "fp32")),
        _line(rows, "all, bf16", 1, lambda r: rank(r["all"], "bf16")),
    ]
    for colour, block in enumerate(_BLOCKS, start=2):
        if rows and all(block in row["blocks"] for row in rows):
            lines.append(
                _line(
                    rows, f"{block}, fp32", colour, lambda r, b=block: rank(r["blocks"][b], "fp32")
                )
            )
    return Panel(
        title="Stable rank of the change",
        note="‖D‖F² / s1², mean over matrices",
        lines=_known(*lines),
        wide=True,
    )


def _directions(rows: Sequence[Row]) -> Panel:
    to_end = rows[-1].get("similarity_to_end", {}) if rows else {}
    known = {int(step): stats for step, stats in to_end.items() if stats}
    lines = [
        _line(rows, "to the recording before", 0, lambda r: _similarity(r, "mean")),
        Line(
            label="to the end",
            xs=list(known),
            ys=[stats["mean"] for stats in known.values()],
            colour=1,
            marked=True,
        ),
        _line(rows, "chance", NEUTRAL, lambda r: _similarity(r, "chance"), style="dashed"),
    ]
    return Panel(
        title="Directions of the change",
        note="similarity of the top 8 left singular directions, mean over matrices; 1: same subspace",
        lines=_known(*lines),
        y_range=(0.0, 1.04),
        wide=True,
    )


def _line(
    rows: Sequence[Row],
    label: str,
    colour: int,
    value: Callable[[Row], float | None],
    style: Any = "solid",
) -> Line:
    points = [(row["step"], value(row)) for row in rows]
    known = [(step, y) for step, y in points if y is not None]
    return Line(
        label=label,
        xs=[step for step, _ in known],
        ys=[y for _, y in known],
        colour=colour,
        style=style,
        marked=style == "solid",
    )


def _stack(
    rows: Sequence[Row], names: Sequence[str], value: Callable[[Row, str], float]
) -> list[Line]:
    """One area for each name; an area needs two recordings."""
    if len(rows) < 2:
        return []
    return [
        Line(
            label=name,
            xs=[row["step"] for row in rows],
            ys=[value(row, name) for row in rows],
            colour=colour,
        )
        for colour, name in enumerate(names)
    ]


def _bins(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    shared = set.intersection(*(set(row["all"]["ulps"]) for row in rows))
    return [name for name in rows[0]["all"]["ulps"] if name in shared - {"0"}]


def _known(*lines: Line) -> list[Line]:
    return [line for line in lines if line.xs]


def _adam(row: Row, name: str) -> float | None:
    return row["all"]["adam"][name] if row["all"]["adam"] else None


def _similarity(row: Row, name: str) -> float | None:
    return row["all"]["similarity"][name] if row["all"]["similarity"] else None
