"""Compares runs: the settings in which they differ, and the best run by each metric."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.plain_text import write_csv
from opd.tracking.formatting import number
from opd.tracking.runs import RunRecord, flat, read_run

# A run's own name is not a setting.
_NOT_SETTINGS = ("run.dir",)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEntry:
    """One run of a comparison: its name in it, and its values of the settings that differ."""

    run: RunRecord
    name: str
    settings: dict[str, str]

    @property
    def typed(self) -> list[str]:
        """The differing settings as one types them on a command line."""
        return [f"{key}={value}" for key, value in self.settings.items() if value]

    @property
    def label(self) -> str:
        """The differing settings, else the name."""
        return " ".join(self.typed) or self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Runs, best first, and the names of the settings in which they differ."""

    entries: list[RunEntry]
    settings: list[str]
    tasks: list[str]


def compare(folders: Sequence[str | Path]) -> RunComparison:
    """Read and rank runs: by final accuracy (mean over tasks), then held-out reverse KL, then loss.

    A run that crashed before its first step is kept at the end. Raises ``ValueError`` when a folder is
    not a run's, or no run has logged a step.
    """
    runs = [read_run(folder) for folder in folders]
    if not any(run.rows for run in runs):
        raise ValueError(
            f"found no steps in any of {len(runs)} runs; a comparison needs at least one run with "
            "metrics; give folders that `opd train` wrote"
        )
    runs.sort(key=_rank)
    names = [run.name for run in runs]
    differing = _differing(runs)
    entries = [
        RunEntry(
            run=run,
            name=run.name if names.count(run.name) == 1 else str(run.folder),
            settings={key: values[index] for key, values in differing.items()},
        )
        for index, run in enumerate(runs)
    ]
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    return RunComparison(entries=entries, settings=list(differing), tasks=tasks)


def _rank(run: RunRecord) -> tuple[bool, float, float, float]:
    accuracies = [result.after for result in run.results]
    kls = [kl for task in run.tasks if (kl := run.series(f"eval/{task}/reverse_kl").last)]
    loss = run.series("loss/total").last
    return (
        not run.rows,
        -sum(accuracies) / len(accuracies) if accuracies else math.inf,
        sum(kls) / len(kls) if kls else math.inf,
        math.inf if loss is None or math.isnan(loss) else loss,
    )


def _differing(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Setting -> its value in each run, for the settings in which the runs differ.

    A key that some runs lack because they chose another option of its group is left out, since the
    choice explains it, unless the runs that have it differ in it; so is one that repeats the choice,
    as ``loss.kind=jsd`` does beside ``loss=jsd``.
    """
    choices = {
        group: [str(run.choices.get(group, "")) for run in runs]
        for group in sorted({group for run in runs for group in run.choices})
    }
    differing = {group: values for group, values in choices.items() if len(set(values)) > 1}
    leaves = [flat(run.config) for run in runs]
    for key in sorted({key for each in leaves for key in each} - set(_NOT_SETTINGS)):
        values = [_typed(each[key]) if key in each else "" for each in leaves]
        present = {_typed(each[key]) for each in leaves if key in each}
        is_missing = any(key not in each for each in leaves)
        chosen = differing.get(key.split(".")[0])
        if chosen is not None and all(v in ("", c) for v, c in zip(values, chosen, strict=True)):
            continue
        if len(present) > 1 or (is_missing and chosen is None):
            differing[key] = values
    return differing


def _typed(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Score:
    entry: RunEntry
    value: float
    step: int


def conclusions(comparison: RunComparison) -> list[str]:
    """Sentences: the best run by each metric, and caveats."""
    lines: list[str] = []
    for task in comparison.tasks:
        final = _scores(comparison, f"eval/{task}/accuracy")
        if final:
            lines.append(f"Best {task} accuracy: {_describe_best(final, max)}")
            peak = max(_scores(comparison, f"eval/{task}/accuracy", max), key=lambda s: s.value)
            if peak.value > max(score.value for score in final):
                lines.append(
                    f"Highest {task} accuracy on the way, not kept to the end: "
                    f"{peak.entry.label}: {peak.value:.3f} at step {peak.step}."
                )
        sampled = _scores(comparison, f"eval/{task}/mean_at_k")
        if sampled:
            lines.append(f"Best {task} mean@k: {_describe_best(sampled, max)}")
        divergence = _scores(comparison, f"eval/{task}/reverse_kl")
        if divergence:
            lines.append(f"Lowest held-out reverse KL on {task}: {_describe_best(divergence, min)}")
    return lines + _caveats(comparison)


def _scores(
    comparison: RunComparison, metric: str, pick: Callable[..., Any] | None = None
) -> list[_Score]:
    """Each run's last value of the metric, or the one that ``pick`` chooses."""
    scores = []
    for entry in comparison.entries:
        series = entry.run.series(metric)
        points = [p for p in zip(series.values, series.steps, strict=True) if not math.isnan(p[0])]
        if points:
            value, step = pick(points, key=lambda p: p[0]) if pick else points[-1]
            scores.append(_Score(entry=entry, value=value, step=step))
    return scores


def _describe_best(scores: list[_Score], better: Callable[..., Any]) -> str:
    """``optim=adamw optim.lr=0.001: 0.930 at step 120; next: ...``; ties are named together."""
    best = better(score.value for score in scores)
    first = [score for score in scores if score.value == best]
    rest = [score for score in scores if score.value != best]
    if len(first) > 1:
        names = "; ".join(score.entry.label for score in first)
        text = f"{len(first)} runs alike at {number(best)} ({names})"
    else:
        text = f"{first[0].entry.label}: {number(best)} at step {first[0].step}"
    if rest:
        second = better(rest, key=lambda score: score.value)
        text += f"; next {second.entry.label}: {number(second.value)}"
    return f"{text}."


def _caveats(comparison: RunComparison) -> list[str]:
    unfinished = [entry for entry in comparison.entries if not entry.run.finished]
    lines = []
    if unfinished:
        listed = "; ".join(f"{entry.label} ({entry.run.status})" for entry in unfinished)
        lines.append(f"Not finished, so not comparable at the end: {listed}.")
    if len(comparison.entries) > 1 and "seed" not in comparison.settings:
        lines.append("One seed for every setting: small differences may be chance.")
    return lines


def table(comparison: RunComparison) -> list[dict[str, str | float | int | None]]:
    """The rows of the CSV file, one for each run; numbers stay numbers.

    A metric's name is none that a setting has (``loss`` is a setting, ``training loss`` a metric).
    """
    rows = []
    for entry in comparison.entries:
        run = entry.run
        row: dict[str, str | float | int | None] = {"run": entry.name, "status": run.status}
        row |= {"step": run.step, **entry.settings}
        for task in comparison.tasks:
            result = run.result(task)
            row |= {
                f"{task} before": result.before if result else None,
                f"{task} accuracy": result.after if result else None,
                f"{task} best": result.best if result else None,
                f"{task} best step": result.best_step if result else None,
                f"{task} teacher": result.teacher if result else None,
                f"{task} gap closed": result.gap_closed if result else None,
                f"{task} mean@k": run.series(f"eval/{task}/mean_at_k").last,
                f"{task} reverse KL": run.series(f"eval/{task}/reverse_kl").last,
            }
        generated = run.series("tokens/generated").values
        row |= {
            "training loss": run.series("loss/total").last,
            "teacher nll": run.series("teacher/nll").last,
            "length": run.series("rollout/length").last,
            "tokens generated": sum(generated) if generated else None,
            "seconds": max(run.wall().values(), default=0.0) or None,
        }
        rows.append(row)
    return _without_empty_columns(rows)


def _without_empty_columns(
    rows: list[dict[str, str | float | int | None]],
) -> list[dict[str, str | float | int | None]]:
    kept = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    return [{name: row[name] for name in kept} for row in rows]


def write_table(comparison: RunComparison, path: Path) -> None:
    """The table as CSV with a header; a missing number is an empty cell."""
    rows = table(comparison)
    write_csv(path, list(rows[0]), rows)
