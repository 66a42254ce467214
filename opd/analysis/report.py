"""``report.html`` and ``report.md``: pictures, tables, and what each of them means."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from opd.analysis import figures
from opd.analysis.formatting import HEADLINES, at, meaning, shown
from opd.analysis.overlap import overlaps
from opd.analysis.rows import Row, as_parts, as_stored
from opd.analysis.walk import Question

REPORT, APPENDIX = "report.html", "report.md"
PRUNE_PICTURE = "prune.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A picture of the report and the sentence under it."""

    title: str
    path: Path
    said: str

    @property
    def data(self) -> str:
        """The picture as text inside the page."""
        return base64.b64encode(self.path.read_bytes()).decode()


def write_report(question: Question, rows: Sequence[Row], found: dict[str, Any], out: Path) -> Path:
    """Draw the pictures and write both reports into ``out``; the path of the page."""
    measured = [row for row in rows if row["status"] == "ok"]
    context = {
        "question": question,
        "found": found,
        "numel": sum(row["numel"] for row in as_stored(measured)),
        "headlines": _headlines(found),
        "lead": meaning(found),
        "pictures": _pictures(measured, found, out),
        "blocks": found["block"],
        "modules": found["module"],
        "levels": found["overlap_levels"],
        "accuracies": _accuracies(found["prune"]),
        "shown": shown,
    }
    for template, name in (("report.html.j2", REPORT), ("report.md.j2", APPENDIX)):
        page = _template(template).render(context)
        scratch = out / f"{name}.part"
        scratch.write_text(page, encoding="utf-8")
        scratch.replace(out / name)
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
    """Name, and observed | null | excess | z as text."""
    lines = []
    for headline in HEADLINES:
        values = [at(found[part], headline.path) for part in ("paper", "null", "excess", "z")]
        if values[0] is not None:
            units = (headline.unit, headline.unit, headline.unit, "z")
            lines.append((headline.name, [shown(v, u) for v, u in zip(values, units, strict=True)]))
    return lines


def _pictures(measured: Sequence[Row], found: dict[str, Any], out: Path) -> list[Shown]:
    rows = as_parts(measured)

    def share_zero(row: Row) -> float:
        return 100 * row["bf16"]["below"]["1e-5"] / row["numel"]

    def over_null(row: Row) -> float:
        return share_zero(row) - 100 * row["bf16"]["expected"]["below"]["1e-5"][0] / row["numel"]

    def stable_rank(row: Row) -> float:
        return row["bf16"].get("spectrum", {}).get("stable_rank", float("nan"))

    made = [
        Shown(
            title="How many weights stayed put",
            path=figures.sparsity(found, out / "sparsity.png"),
            said="The share of weights whose change is smaller than a threshold. Where the dashed "
            "line (an update without any structure, rounded to the same format) runs along the "
            "solid one, rounding alone explains the sparsity. The right panel is the same in the "
            "files' own format: in float32 nearly every weight moves.",
        ),
        Shown(
            title="Sparsity by layer and module type",
            path=figures.heat_map(rows, share_zero, "abs(D) < 1e-5, %", out / "sparsity_map.png"),
            said="Bright cells hardly changed. Large weights have coarse number spacing, so modules "
            "with large weights look sparser whatever was learnt.",
        ),
        Shown(
            title="Sparsity beyond the null",
            path=figures.heat_map(
                rows, over_null, "observed - null, points", out / "excess_map.png", around=0.0
            ),
            said="What is left of the picture above once rounding is taken off, in percentage "
            "points. Pale cells leave nothing to explain; red ones concentrate their movement on "
            "fewer weights than an even update of the same norm, blue ones spread it over more.",
        ),
        Shown(
            title="Where changes fall: small weights and principal weights",
            path=figures.near_zero(rows, found, out / "near_zero.png"),
            said="Left: small weights have fine spacing, so the same step shows in them and drowns "
            "in large ones; a preference for small weights is the distance between the lines. "
            "Right: how much denser changes are inside a mask than overall (1 = no preference), "
            "with the null as a bar.",
        ),
        Shown(
            title="Stable rank by layer and module type",
            path=figures.heat_map(rows, stable_rank, "stable rank of D", out / "stable_rank.png"),
            said="How many directions carry an update, |D|² / s₁². A random update of these shapes "
            f"has {shown(at(found, ('null', 'stable_rank', 'median')), '')} (median); rounding "
            "cannot lower it, so low values are learnt structure.",
        ),
    ]
    if any("spectrum" in row["bf16"] for row in rows):
        path = figures.spectra(rows, out / "spectra.png")
        said = (
            "Singular values of the update of three matrices: the most concentrated, the median, "
            "the least. What rises above the dashed edge is more than an even random update of "
            "this norm could show; what lies under the dotted edge cannot be told from rounding."
        )
        made.append(Shown(title="Spectra of the update", path=path, said=said))
    return made + _overlap_picture(measured, out) + _prune_picture(found["prune"], out)


def _overlap_picture(rows: Sequence[Row], out: Path) -> list[Shown]:
    groups: dict[str, list[Row]] = {}
    for row in as_parts(rows):
        groups.setdefault(row["module"], []).append(row)
    bars = [overlaps(as_stored(rows), "1e-5"), *(overlaps(g, "1e-5", n) for n, g in groups.items())]
    known = [bar for bar in bars if bar is not None and bar.a]
    if not known:
        return []
    path = figures.overlap_bars(known, out / "overlap.png")
    said = (
        "The share of the first model's changed weights that the second changed too. Two updates "
        "that know nothing of each other already meet in small weights, where rounding lets "
        "changes through: the black dot is that chance, and only what exceeds it is agreement."
    )
    return [Shown(title="Overlap of the two updates", path=path, said=said)]


def _prune_picture(pruned: dict[str, Any] | None, out: Path) -> list[Shown]:
    if pruned is None:
        return []
    said = (
        "What the moves are for: a share of them goes back to the base's values, and the recipe's "
        f"{pruned['questions']:,} questions are asked again. Where taking back the smallest changes "
        "nothing, the largest do the work; the random curve is what any share of that size costs."
    )
    return [Shown(title="Which moves the model needs", path=out / PRUNE_PICTURE, said=said)]


def _accuracies(pruned: dict[str, Any] | None) -> list[list[str]]:
    """A line for each share taken back, a cell for each order; the first line names them."""
    if pruned is None:
        return []
    lines = [["moves taken back", *(f"{order} first" for order in pruned["curves"])]]
    for points in zip(*pruned["curves"].values(), strict=True):
        cells = [f"{p['accuracy']:.3f} ({p['low']:.3f} to {p['high']:.3f})" for p in points]
        lines.append([shown(points[0]["share"], "%"), *cells])
    return lines
