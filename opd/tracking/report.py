"""Self-contained HTML pages: one run, or several side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from opd.tracking.compare import RunComparison, compare, conclusions, table, write_table
from opd.tracking.formatting import duration, number
from opd.tracking.panels import comparison_panels, other_panels, run_line, run_panels
from opd.tracking.runs import RunRecord, read_started_run
from opd.tracking.signs import run_warnings
from opd.tracking.weight_panels import weight_panels

REPORT = "report.html"
COMPARISON = "comparison.html"
COMPARISON_CSV = "comparison.csv"
_TRANSCRIPTS = 8
_FULL_COLOUR_NATS = 3.0
_TASK_COLUMNS = ("before", "accuracy", "best", "teacher", "gap closed", "mean@k", "reverse KL")
_LAST_COLUMNS = ("training loss", "seconds")


def write_report(run_folder: str | Path) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Raises ``ValueError`` when the folder is not a run's or has no steps yet.
    """
    run = read_started_run(run_folder)
    page = _template("run.html.j2").render(
        run=run,
        title=run.name,
        facts=_facts(run),
        warnings=run_warnings(run),
        panels=run_panels(run),
        weights=weight_panels(run.recorded),
        others=other_panels(run),
        shares=_time_shares(run),
        transcripts=_transcripts(run),
        sections=_sections(run),
    )
    return _write_page(run.folder / REPORT, page)


def compare_runs(folders: Sequence[str | Path], out: str | Path) -> tuple[Path, Path]:
    """Write comparison.html and comparison.csv into the folder ``out``; return both paths.

    Raises ``ValueError`` when a folder is not a run's, or no run has logged a step.
    """
    comparison = compare(folders)
    rows = table(comparison)
    page = _template("compare.html.j2").render(
        title=f"{len(rows)} runs compared",
        conclusions=conclusions(comparison),
        panels=comparison_panels(comparison),
        legend=[run_line(index, entry, [], []) for index, entry in enumerate(comparison.entries)],
        settings=comparison.settings,
        task_columns=[(task, _columns(task, rows)) for task in comparison.tasks],
        last_columns=[column for column in _LAST_COLUMNS if column in rows[0]],
        rows=rows,
        entries=comparison.entries,
        best=_best_cells(comparison, rows),
    )
    Path(out).mkdir(parents=True, exist_ok=True)
    csv_path = Path(out) / COMPARISON_CSV
    write_table(comparison, csv_path)
    return _write_page(Path(out) / COMPARISON, page), csv_path


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "svg": lambda panel: Markup(panel.svg)}
    environment.globals["cell"] = cell
    return environment.get_template(name)


def _write_page(path: Path, page: str) -> Path:
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(page, encoding="utf-8")
    return scratch.replace(path)


def cell(column: str, value: str | float | int | None) -> str:
    """The text of a table cell: shares with three decimals, seconds as a duration, counts as integers."""
    match value:
        case None | "":
            return "-"
        case str() | bool():
            return str(value)
    if column == "seconds":
        return duration(value)
    if column.endswith("gap closed"):
        return f"{100 * value:.0f} %"
    if column.endswith(("before", "accuracy", "best", "teacher", "mean@k")):
        return f"{value:.3f}"
    if isinstance(value, int) or column.startswith("tokens"):
        return f"{value:,.0f}"
    return number(value)


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """(name, value) of the facts below the title."""
    facts = [("status", run.status), ("steps", f"{run.step}")]
    if run.planned and run.planned != run.step:
        facts[1] = ("steps", f"{run.step} of {run.planned}")
    seconds = max(run.wall().values())
    if seconds:
        facts.append(("time", duration(seconds)))
    generated = [value for value in run.series("tokens/generated").values if value == value]
    if generated:
        facts.append(("tokens generated", f"{sum(generated):,.0f}"))
        if seconds:
            facts.append(("tokens per second", number(sum(generated) / seconds)))
    return facts + [(group, str(choice)) for group, choice in sorted(run.choices.items())]


def _time_shares(run: RunRecord) -> list[tuple[str, float, int]]:
    """(phase, share of the total time, colour), the largest share first."""
    phases = ("rollout", "teacher", "learn", "sync", "eval")
    totals = {
        phase: sum(v for v in run.series(f"time/{phase}").values if v == v) for phase in phases
    }
    total = sum(totals.values())
    shares = [(p, totals[p] / total, i) for i, p in enumerate(phases) if total and totals[p]]
    return sorted(shares, key=lambda share: -share[1])


def _sections(run: RunRecord) -> list[tuple[str, str]]:
    """(heading, text) of the collapsed sections: configuration and provenance."""
    command = run.about["command"]
    texts = {
        "Configuration": dict(run.config),
        "Command": " ".join(command) if isinstance(command, list) else command,
        "Git commit": run.about["git"],
        "Versions": run.about["versions"],
    }
    return [
        (name, text if isinstance(text, str) else yaml.safe_dump(text, sort_keys=False))
        for name, text in texts.items()
        if text
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a transcript: its text, its colour, the strength of the colour (0 to 1), a tooltip."""

    text: str
    side: str
    strength: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the student wrote at one step."""

    step: int
    correct: bool
    tokens: list[Token]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One prompt and the student's completions at the first and at the last evaluation."""

    task: str
    prompt: str
    answer: str
    completions: list[Completion]


def _transcripts(run: RunRecord) -> list[Transcript]:
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in run.samples:
        key = (str(sample.get("task", "")), str(sample.get("uid", sample.get("prompt", ""))))
        grouped.setdefault(key, []).append(sample)
    transcripts = []
    for (task, _), samples in list(grouped.items())[:_TRANSCRIPTS]:
        last = samples[-1]
        shown = [samples[0], last] if last["step"] != samples[0]["step"] else [last]
        transcripts.append(
            Transcript(
                task=task,
                prompt=str(last.get("prompt", "")),
                answer=str(last.get("answer", "")),
                completions=[_completion(sample) for sample in shown],
            )
        )
    return transcripts


def _completion(sample: dict[str, Any]) -> Completion:
    texts, gaps = sample.get("tokens") or [], sample.get("gap") or []
    return Completion(
        step=sample["step"],
        correct=bool(sample.get("correct")),
        tokens=[_token(text, gap) for text, gap in zip(texts, gaps, strict=False)],
        text=str(sample.get("completion", "")),
    )


def _token(text: str, gap: float) -> Token:
    return Token(
        text=text or "·",
        side="worse" if gap < 0 else "better",
        strength=round(min(1.0, abs(gap) / _FULL_COLOUR_NATS), 2),
        why=f"teacher - student: {gap:+.2f} nats",
    )


def _columns(task: str, rows: list[dict[str, Any]]) -> list[str]:
    """The columns of a task; the best accuracy only where it differs from the last one in some run."""
    columns = [c for name in _TASK_COLUMNS if (c := f"{task} {name}") in rows[0]]
    differs = any(row.get(f"{task} best") != row.get(f"{task} accuracy") for row in rows)
    return [column for column in columns if differs or column != f"{task} best"]


def _best_cells(comparison: RunComparison, rows: list[dict[str, Any]]) -> set[tuple[int, str]]:
    """Row number and column of the best value of each accuracy and divergence."""
    best = set()
    for task in comparison.tasks:
        for name, better in (
            ("accuracy", max),
            ("mean@k", max),
            ("best", max),
            ("reverse KL", min),
        ):
            column = f"{task} {name}"
            values = [row.get(column) for row in rows]
            known = [value for value in values if value is not None]
            if len(known) > 1:
                top = better(known)
                best |= {(i, column) for i, value in enumerate(values) if value == top}
    return best
