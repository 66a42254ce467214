"""The panels of a report and of a comparison: which metrics are plotted together."""

import math
from collections.abc import Callable, Sequence

from opd.tracking.compare import RunComparison, RunEntry
from opd.tracking.plots import NEUTRAL, Line, Panel, Style
from opd.tracking.runs import RunRecord, Series

_PHASES = ("rollout", "teacher", "learn", "sync", "eval")

# title, note, and (metric, legend label)
_TRAINING = (
    (
        "Teacher NLL and student entropy",
        "nats per token on the student's own samples",
        (("teacher/nll", "teacher NLL"), ("student/entropy", "entropy")),
    ),
    ("Completion length", "tokens", (("rollout/length", "training samples"),)),
    (
        "Truncated completions",
        "share that reached max_tokens",
        (("rollout/truncated", "training samples"),),
    ),
    ("Gradient norm", "before clipping", (("optim/grad_norm", "gradient norm"),)),
    ("Learning rate", "", (("optim/lr", "learning rate"),)),
    (
        "Engine against learner",
        "difference of log-probs, nats",
        (("engine/logp_gap", "mean"), ("engine/logp_gap_max", "largest")),
    ),
    ("Bytes sent to the engine", "per step", (("sync/bytes", "bytes"),)),
)

_COMPARED = (
    ("loss/total", "Loss"),
    ("teacher/nll", "Teacher NLL, nats per token"),
    ("student/entropy", "Student entropy, nats per token"),
    ("rollout/length", "Completion length, tokens"),
    ("optim/grad_norm", "Gradient norm"),
    ("engine/logp_gap", "Engine against learner, nats"),
    ("time/step", "Seconds per step"),
)


def run_panels(run: RunRecord) -> list[Panel]:
    """The panels of the report of one run."""
    panels = [*_task_panels(run), _loss_panel(run), *_teacher_panels(run)]
    for title, note, metrics in _TRAINING:
        named = [(run.series(name), label) for name, label in metrics]
        if title == "Completion length":
            named += [(run.series(f"eval/{t}/length"), f"{t}, held out") for t in run.tasks]
        panels.append(Panel(title=title, note=note, lines=_lines(named)))
    panels += [_time_panel(run), _speed_panel(run)]
    return [panel for panel in panels if panel.lines]


def other_panels(run: RunRecord) -> list[Panel]:
    """One small panel for each metric that no other panel shows."""
    shown = {name for _, _, metrics in _TRAINING for name, _ in metrics}
    shown |= {f"time/{phase}" for phase in (*_PHASES, "step")} | {"tokens/generated"}
    for task in run.tasks:
        names = ("accuracy", "mean_at_k", "teacher_accuracy", "reverse_kl", "length")
        shown |= {f"eval/{task}/{name}" for name in names}
    shown |= set(_teacher_metrics(run))
    elsewhere = ("loss/", "weights/")
    names = [name for name in run.metrics if name not in shown and not name.startswith(elsewhere)]
    return [Panel(title=name, lines=_lines([(run.series(name), name)])) for name in names]


def comparison_panels(comparison: RunComparison) -> list[Panel]:
    """One panel for each compared metric, with all runs in it."""
    panels = [panel for task in comparison.tasks for panel in _compared_task(comparison, task)]
    for metric, title in _COMPARED:
        lines = _overlaid(comparison, metric, _steps)
        panels.append(Panel(title=title, lines=lines, wide=True))
    return [panel for panel in panels if panel.lines]


def _compared_task(comparison: RunComparison, task: str) -> list[Panel]:
    panels = []
    levels = _teacher_levels(comparison, task)
    for title, x_label, xs in (
        (f"Accuracy on {task}", "step", _steps),
        (f"Accuracy on {task} by time", "minutes of training", _minutes),
    ):
        lines = _overlaid(comparison, f"eval/{task}/accuracy", xs, marked=True)
        panels.append(
            Panel(
                title=title,
                note="dashed: the teacher" if levels else "",
                lines=lines + levels if lines else [],
                x_label=x_label,
                y_range=_share_range(lines + levels),
                wide=True,
            )
        )
    sampled = _overlaid(comparison, f"eval/{task}/mean_at_k", _steps, marked=True)
    title, y_range = f"mean@k on {task}", _share_range(sampled)
    panels.append(Panel(title=title, lines=sampled, y_range=y_range, wide=True))
    distance = _overlaid(comparison, f"eval/{task}/reverse_kl", _steps, marked=True)
    title = f"Held-out reverse KL on {task}, nats per token"
    panels.append(Panel(title=title, lines=distance, wide=True))
    return panels


def _lines(named: Sequence[tuple[Series, str]]) -> list[Line]:
    return [
        Line(label=label, xs=series.steps, ys=series.values, colour=index)
        for index, (series, label) in enumerate(named)
        if series
    ]


def _task_panels(run: RunRecord) -> list[Panel]:
    return [panel for task in run.tasks for panel in (_accuracy(run, task), _distance(run, task))]


def _accuracy(run: RunRecord, task: str) -> Panel:
    lines = _marked(run, f"eval/{task}/accuracy", "student, greedy", 0)
    lines += _marked(run, f"eval/{task}/mean_at_k", "student, mean@k", 2)
    result = run.result(task)
    if result is not None and result.teacher is not None:
        lines.append(Line(label="teacher", xs=[], ys=[result.teacher], colour=1, style="dashed"))
    return Panel(
        title=f"Accuracy on {task}",
        note="held-out prompts",
        lines=lines,
        y_range=_share_range(lines),
        wide=True,
    )


def _distance(run: RunRecord, task: str) -> Panel:
    return Panel(
        title=f"Distance to the teacher on {task}",
        note="reverse KL on held-out prompts, nats per token",
        lines=_marked(run, f"eval/{task}/reverse_kl", "reverse KL", 0),
        wide=True,
    )


def _marked(run: RunRecord, metric: str, label: str, colour: int) -> list[Line]:
    series = run.series(metric)
    if not series:
        return []
    return [Line(label=label, xs=series.steps, ys=series.values, colour=colour, marked=True)]


def _loss_panel(run: RunRecord) -> Panel:
    """The total and its parts, without a part that equals the total."""
    total = run.series("loss/total")
    names = [name for name in run.metrics if name.startswith("loss/") and name != "loss/total"]
    parts = [(run.series(name), name.removeprefix("loss/")) for name in names]
    others = [(series, label) for series, label in parts if not _are_equal(series, total)]
    equal = [label for series, label in parts if _are_equal(series, total)]
    label = f"total: {equal[0].replace('_', ' ')}" if equal else "total"
    return Panel(title="Loss", note="per token", lines=_lines([(total, label), *others]))


def _teacher_metrics(run: RunRecord) -> dict[str, tuple[str, str]]:
    """(teacher, quantity) of each metric ``teacher/<teacher>/<quantity>``."""
    parts = {
        name: name.removeprefix("teacher/").rpartition("/")
        for name in run.metrics
        if name.startswith("teacher/")
    }
    return {name: (teacher, quantity) for name, (teacher, _, quantity) in parts.items() if teacher}


def _teacher_panels(run: RunRecord) -> list[Panel]:
    """One panel for each quantity measured of several teachers, with a curve for each teacher."""
    metrics = _teacher_metrics(run)
    lines: dict[str, list[Line]] = {quantity: [] for _, quantity in metrics.values()}
    teachers = sorted({teacher for teacher, _ in metrics.values()})
    for name, (teacher, quantity) in sorted(metrics.items()):
        series = run.series(name)
        colour, style = _line_style(teachers.index(teacher))
        lines[quantity].append(
            Line(label=teacher, xs=series.steps, ys=series.values, colour=colour, style=style)
        )
    note = "per token of the prompts with that teacher"
    return [
        Panel(title=f"{quantity} of each teacher", note=note, lines=curves)
        for quantity, curves in lines.items()
    ]


def _are_equal(one: Series, other: Series) -> bool:
    return one.steps == other.steps and all(
        math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(one.values, other.values, strict=True)
    )


def _time_panel(run: RunRecord) -> Panel:
    """Seconds per step, stacked by phase; an area needs two steps."""
    rows = [row for row in run.rows if "time/step" in row]
    phases = [phase for phase in _PHASES[:-1] if any(f"time/{phase}" in row for row in rows)]
    lines = [
        Line(
            label=phase,
            xs=[row["step"] for row in rows],
            ys=[row.get(f"time/{phase}") or 0.0 for row in rows],
            colour=_PHASES.index(phase),
        )
        for phase in phases
    ]
    return Panel(
        title="Seconds per step",
        note="by phase",
        lines=lines if len(rows) > 1 else [],
        stacked=True,
    )


def _speed_panel(run: RunRecord) -> Panel:
    rows = [row for row in run.rows if row.get("time/step") and row.get("tokens/generated")]
    line = Line(
        label="tokens per second",
        xs=[row["step"] for row in rows],
        ys=[row["tokens/generated"] / row["time/step"] for row in rows],
    )
    return Panel(
        title="Throughput",
        note="generated tokens per second of the whole step",
        lines=[line] if rows else [],
    )


def _share_range(lines: Sequence[Line]) -> tuple[float, float]:
    """A y range from 0 to a little above the highest share."""
    known = [y for line in lines for y in line.ys if math.isfinite(y)]
    return 0.0, min(1.04, 1.15 * max(known, default=1.0)) or 1.04


def _steps(run: RunRecord, steps: Sequence[int]) -> list[float]:
    return [float(step) for step in steps]


def _minutes(run: RunRecord, steps: Sequence[int]) -> list[float]:
    wall = run.wall()
    return [wall[step] / 60 for step in steps] if max(wall.values()) > 0 else []


def _overlaid(
    comparison: RunComparison,
    metric: str,
    x_values: Callable[[RunRecord, Sequence[int]], list[float]],
    marked: bool = False,
) -> list[Line]:
    lines = []
    for index, entry in enumerate(comparison.entries):
        series = entry.run.series(metric)
        xs = x_values(entry.run, series.steps) if series else []
        if xs:
            lines.append(run_line(index, entry, xs, series.values, marked))
    return lines


def run_line(
    index: int, entry: RunEntry, xs: Sequence[float], ys: Sequence[float], marked: bool = False
) -> Line:
    """The curve of the comparison's run number ``index``."""
    colour, style = _line_style(index)
    return Line(label=entry.label, xs=xs, ys=ys, colour=colour, style=style, marked=marked)


def _line_style(index: int) -> tuple[int, Style]:
    """Ten colours, then the same colours with other dashes."""
    styles: tuple[Style, ...] = ("solid", "dotted", "dashed")
    return index % NEUTRAL, styles[index // NEUTRAL % 3]


def _teacher_levels(comparison: RunComparison, task: str) -> list[Line]:
    results = [entry.run.result(task) for entry in comparison.entries]
    levels = dict.fromkeys(r.teacher for r in results if r is not None and r.teacher is not None)
    return [Line(label="teacher", xs=[], ys=[y], colour=NEUTRAL, style="dashed") for y in levels]
