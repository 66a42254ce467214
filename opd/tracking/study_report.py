"""Arms of a study over seeds: means with confidence intervals, and paired differences."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from opd.plain_text import figure_text
from opd.tracking.runs import RunRecord

T_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
"""Two-sided 95 % quantiles of Student's t for 1 to 20 degrees of freedom."""
T_95_BEYOND = 2.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and half the width of its 95 % t-interval; infinite for a single value."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the mean differs from zero at the 95 % level."""
        return abs(self.mean) > self.half


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One number of a run by which arms are compared: ``reduce`` applied to the values of a metric."""

    name: str
    metric: str
    reduce: Callable[[Sequence[float]], float]
    higher_is_better: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One arm minus another, seed by seed."""

    measure: Measure
    arm: str
    other: str
    interval: Interval

    @property
    def sentence(self) -> str:
        """The difference and what may be concluded from it."""
        names = f"{self.arm} against {self.other}, {self.measure.name}: {self.interval.mean:+.3f}"
        if not math.isfinite(self.interval.half):
            return f"{names}; one seed is not enough to conclude"
        names += f" ± {self.interval.half:.3f}"
        if not self.interval.excludes_zero:
            return f"{names}: no difference that these seeds can show"
        better = (self.interval.mean > 0) == self.measure.higher_is_better
        return f"{names}: real, {self.arm} is {'better' if better else 'worse'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """Finished runs by arm and seed, the measures, and the pairs of arms to compare."""

    runs: Mapping[str, Mapping[int, RunRecord]]
    measures: Sequence[Measure]
    pairs: Sequence[tuple[str, str]]

    def values(self, arm: str, measure: Measure) -> dict[int, float]:
        """Seed -> the measure, for each seed with the metric."""
        series = {seed: run.series(measure.metric).values for seed, run in self.runs[arm].items()}
        return {seed: measure.reduce(values) for seed, values in series.items() if values}

    def interval(self, arm: str, measure: Measure) -> Interval:
        """Mean and confidence interval over seeds."""
        return interval(list(self.values(arm, measure).values()))

    def differences(self) -> list[Difference]:
        """Every pair by every measure, paired by the seeds that both arms have."""
        differences = []
        for measure in self.measures:
            for arm, other in self.pairs:
                a, b = self.values(arm, measure), self.values(other, measure)
                paired = [a[seed] - b[seed] for seed in a if seed in b]
                differences.append(
                    Difference(measure=measure, arm=arm, other=other, interval=interval(paired))
                )
        return differences


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t-interval of independent values."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Interval(mean=mean, half=math.inf)
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    quantile = T_95[count - 2] if count - 2 < len(T_95) else T_95_BEYOND
    return Interval(mean=mean, half=quantile * math.sqrt(variance / count))


def study_measures(task: str) -> list[Measure]:
    """Accuracy at the end, accuracy averaged over the evaluations, reverse KL at the end."""
    accuracy, kl = f"eval/{task}/accuracy", f"eval/{task}/reverse_kl"
    return [
        Measure(name="accuracy", metric=accuracy, reduce=_last, higher_is_better=True),
        Measure(name="accuracy on the way", metric=accuracy, reduce=_mean, higher_is_better=True),
        Measure(name="reverse KL", metric=kl, reduce=_last, higher_is_better=False),
    ]


def _last(values: Sequence[float]) -> float:
    return values[-1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def arms_table(arms: Arms) -> Table:
    """One row for each arm: each measure, mean over seeds with its interval."""
    seeds = max(len(runs) for runs in arms.runs.values())
    table = Table(
        title=f"After training, mean over {seeds} seeds ± 95 % interval",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
    )
    table.add_column("trained")
    table.add_column("density", justify="right")
    for measure in arms.measures:
        table.add_column(measure.name, justify="right")
    for arm, runs in arms.runs.items():
        density = next(iter(runs.values())).series("mask/density").last
        cells = [arm, "100 %" if density is None else f"{density:.2%}"]
        cells += [_format_interval(arms.interval(arm, measure)) for measure in arms.measures]
        table.add_row(*cells)
    return table


def _format_interval(interval: Interval) -> str:
    half = f" ± {interval.half:.3f}" if math.isfinite(interval.half) else ""
    return f"{interval.mean:.3f}{half}"


def write_arms(arms: Arms, folder: Path, title: str) -> list[Path]:
    """study.json, study.md and study.png in ``folder``; returns their paths."""
    results: dict[str, Any] = {
        "values": {
            arm: {measure.name: arms.values(arm, measure) for measure in arms.measures}
            for arm in arms.runs
        },
        "differences": [
            {
                "measure": difference.measure.name,
                "arm": difference.arm,
                "other": difference.other,
                **asdict(difference.interval),
                "sentence": difference.sentence,
            }
            for difference in arms.differences()
        ],
    }
    paths = [folder / f"study.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(results, indent=1))
    paths[1].write_text(_markdown(arms, title))
    _draw_figure(arms, title, paths[2])
    return paths


def _markdown(arms: Arms, title: str) -> str:
    head = ["trained", "density", *(m.name for m in arms.measures), "accuracy by seed"]
    lines = [f"# {title}", "", " | ".join(["", *head, ""]).strip()]
    lines.append("|" + "---|" * len(head))
    for arm, runs in arms.runs.items():
        density = next(iter(runs.values())).series("mask/density").last
        by_seed = arms.values(arm, arms.measures[0])
        cells = [
            arm,
            "100 %" if density is None else f"{density:.2%}",
            *(_format_interval(arms.interval(arm, m)) for m in arms.measures),
            ", ".join(f"{seed}: {value:.3f}" for seed, value in by_seed.items()),
        ]
        lines.append(" | ".join(["", *cells, ""]).strip())
    lines += ["", "Mean over seeds ± 95 % t-interval. Differences are paired by seed.", ""]
    lines += [f"- {difference.sentence}" for difference in arms.differences()]
    return "\n".join([*lines, "", "![curves and final accuracies](study.png)", ""])


def _draw_figure(arms: Arms, title: str, path: Path) -> None:
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(13, 3.8), layout="constrained", dpi=150)
        curves, *finals = figure.subplots(1, 1 + len(arms.measures), width_ratios=[3, 2, 2, 2])
        _draw_curves(curves, arms)
        for axes, measure in zip(finals, arms.measures, strict=True):
            _draw_intervals(axes, arms, measure)
            if axes is not finals[0]:
                axes.set_yticklabels([])
        for axes in (curves, *finals):
            axes.grid(alpha=0.25)
        figure.suptitle(figure_text(title))
        figure.savefig(path)


def _draw_curves(axes: Any, arms: Arms) -> None:
    measure = arms.measures[0]
    for number, (arm, runs) in enumerate(arms.runs.items()):
        by_step: dict[int, list[float]] = {}
        for run in runs.values():
            series = run.series(measure.metric)
            axes.plot(series.steps, series.values, color=f"C{number}", alpha=0.25, linewidth=0.8)
            for step, value in zip(series.steps, series.values, strict=True):
                by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        means = [_mean(by_step[step]) for step in steps]
        axes.plot(steps, means, color=f"C{number}", linewidth=2, label=figure_text(arm))
    axes.set(xlabel="optimizer step", ylabel=measure.name, title="thin: seeds, thick: their mean")
    axes.legend(frameon=False)


def _draw_intervals(axes: Any, arms: Arms, measure: Measure) -> None:
    for number, arm in enumerate(arms.runs):
        values = list(arms.values(arm, measure).values())
        over_seeds = interval(values)
        half = over_seeds.half if math.isfinite(over_seeds.half) else 0.0
        style = {"color": f"C{number}"}
        axes.errorbar(over_seeds.mean, -number, xerr=half, fmt="o", capsize=4, **style)
        axes.scatter(values, [0.2 - number] * len(values), alpha=0.5, s=14, **style)
    axes.set(xlabel=measure.name, title="mean, 95 % interval, seeds")
    axes.set_yticks([-n for n in range(len(arms.runs))], [figure_text(name) for name in arms.runs])
    axes.set_ylim(0.6 - len(arms.runs), 0.6)
