"""``report.html`` and ``report.md``: figures and tables, each with an explanation."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from opd.analysis import figures
from opd.analysis.formatting import HEADLINES, format_value, interpret, lookup
from opd.analysis.inline_svg import inline_svg
from opd.analysis.overlap import pool_overlap
from opd.analysis.rows import Row, as_parts, as_stored
from opd.analysis.walk import AnalysisInputs

REPORT, APPENDIX = "report.html", "report.md"
PRUNE_FIGURE = "prune.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFigure:
    """A figure of the report and its caption."""

    title: str
    path: Path
    caption: str

    @property
    def svg(self) -> Markup | None:
        """The figure as an element of the page; None where there is no .svg beside the .png."""
        vector = self.path.with_suffix(".svg")
        if not vector.exists():
            return None
        text = vector.read_text(encoding="utf-8")
        return Markup(inline_svg(text, self.title, figures.PAGE_COLOURS))

    @property
    def data(self) -> str:
        """The figure as base64 text inside the page."""
        return base64.b64encode(self.path.read_bytes()).decode()


def write_report(
    inputs: AnalysisInputs, rows: Sequence[Row], found: dict[str, Any], out: Path
) -> Path:
    """Draw the figures and write both reports into ``out``; returns the path of the page."""
    measured = [row for row in rows if row["status"] == "ok"]
    context = {
        "inputs": inputs,
        "found": found,
        "numel": sum(row["numel"] for row in as_stored(measured)),
        "headlines": _headlines(found),
        "sentences": interpret(found),
        "figures": _draw_figures(measured, found, out),
        "blocks": found["block"],
        "modules": found["module"],
        "levels": found["overlap_levels"],
        "accuracies": _accuracies(found["prune"]),
        "format_value": format_value,
    }
    for template, name in (("report.html.j2", REPORT), ("report.md.j2", APPENDIX)):
        page = _template(template).render(context)
        partial = out / f"{name}.part"
        partial.write_text(page, encoding="utf-8")
        partial.replace(out / name)
    return out / REPORT


def _template(name: str) -> jinja2.Template:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    ).get_template(name)


def _headlines(found: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Each headline's name, and observed | null | excess | z as text."""
    lines = []
    for headline in HEADLINES:
        values = [lookup(found[part], headline.path) for part in ("paper", "null", "excess", "z")]
        if values[0] is not None:
            units = (headline.unit, headline.unit, headline.unit, "z")
            lines.append(
                (headline.name, [format_value(v, u) for v, u in zip(values, units, strict=True)])
            )
    return lines


def _draw_figures(measured: Sequence[Row], found: dict[str, Any], out: Path) -> list[ReportFigure]:
    rows = as_parts(measured)

    def share_zero(row: Row) -> float:
        return 100 * row["bf16"]["below"]["1e-5"] / row["numel"]

    def over_null(row: Row) -> float:
        return share_zero(row) - 100 * row["bf16"]["expected"]["below"]["1e-5"][0] / row["numel"]

    def stable_rank(row: Row) -> float:
        return row["bf16"].get("spectrum", {}).get("stable_rank", float("nan"))

    made = [
        ReportFigure(
            title="How many weights did not change",
            path=figures.sparsity(found, out / "sparsity.png"),
            caption="The share of weights whose change is smaller than a threshold. Where the dashed "
            "line (an update without any structure, rounded to the same format) runs along the "
            "solid one, rounding alone explains the sparsity. The right panel shows the same in the "
            "files' own format: in float32 nearly every weight changes.",
        ),
        ReportFigure(
            title="Sparsity by layer and module type",
            path=figures.heat_map(rows, share_zero, "abs(D) < 1e-5, %", out / "sparsity_map.png"),
            caption="Bright cells hardly changed. Large weights have coarse number spacing, so modules "
            "with large weights look sparser whatever was learned.",
        ),
        ReportFigure(
            title="Sparsity beyond the null",
            path=figures.heat_map(
                rows, over_null, "observed - null, points", out / "excess_map.png", around=0.0
            ),
            caption="The figure above minus what rounding alone would show, in percentage "
            "points. Pale cells leave nothing to explain; red ones concentrate their change on "
            "fewer weights than an even update of the same norm, blue ones spread it over more.",
        ),
        ReportFigure(
            title="Where changes fall: small weights and principal weights",
            path=figures.near_zero(rows, found, out / "near_zero.png"),
            caption="Left: small weights have fine spacing, so the same step is visible in them and rounded "
            "away in large ones; a preference for small weights is the distance between the lines. "
            "Right: how much denser changes are inside a mask than overall (1 = no preference), "
            "with the null as a bar.",
        ),
        ReportFigure(
            title="Stable rank by layer and module type",
            path=figures.heat_map(rows, stable_rank, "stable rank of D", out / "stable_rank.png"),
            caption="How many directions carry an update, |D|² / s₁². A random update of these shapes "
            f"has {format_value(lookup(found, ('null', 'stable_rank', 'median')), '')} (median); rounding "
            "cannot lower it, so low values are learned structure.",
        ),
    ]
    return [
        *made,
        *_spectra_figure(rows, out),
        *_overlap_figure(measured, out),
        *_prune_figure(found["prune"], out),
    ]


def _spectra_figure(rows: Sequence[Row], out: Path) -> list[ReportFigure]:
    if not any("spectrum" in row["bf16"] for row in rows):
        return []
    path = figures.spectra(rows, out / "spectra.png")
    caption = (
        "Singular values of the update of three matrices: the most concentrated, the median, "
        "the least. Values above the dashed edge exceed those of an even random update of "
        "this norm; values under the dotted edge cannot be distinguished from rounding."
    )
    return [ReportFigure(title="Spectra of the update", path=path, caption=caption)]


def _overlap_figure(rows: Sequence[Row], out: Path) -> list[ReportFigure]:
    groups: dict[str, list[Row]] = {}
    for row in as_parts(rows):
        groups.setdefault(row["module"], []).append(row)
    bars = [
        pool_overlap(as_stored(rows), "1e-5"),
        *(pool_overlap(g, "1e-5", n) for n, g in groups.items()),
    ]
    known = [bar for bar in bars if bar is not None and bar.a]
    if not known:
        return []
    path = figures.overlap_bars(known, out / "overlap.png")
    caption = (
        "The share of the first model's changed weights that the second changed too. Two independent "
        "updates already overlap in small weights, where changes survive rounding: the black dot is "
        "that chance, and only what exceeds it is agreement."
    )
    return [ReportFigure(title="Overlap of the two updates", path=path, caption=caption)]


def _prune_figure(curve: dict[str, Any] | None, out: Path) -> list[ReportFigure]:
    if curve is None:
        return []
    caption = (
        "What the changes are worth: a share of them is reverted to the base's values, and the model is "
        f"evaluated on the recipe's {curve['questions']:,} held-out prompts. Where reverting the "
        "smallest costs nothing, the largest matter; the random curve is what any share of that size "
        "costs."
    )
    return [
        ReportFigure(
            title="Which changes the model needs", path=out / PRUNE_FIGURE, caption=caption
        )
    ]


def _accuracies(curve: dict[str, Any] | None) -> list[list[str]]:
    """A line for each reverted share, a cell for each order, after a line of headings."""
    if curve is None:
        return []
    lines = [["changes reverted", *(f"{order} first" for order in curve["curves"])]]
    for points in zip(*curve["curves"].values(), strict=True):
        cells = [f"{p['accuracy']:.3f} ({p['low']:.3f} to {p['high']:.3f})" for p in points]
        lines.append([format_value(points[0]["share"], "%"), *cells])
    return lines
