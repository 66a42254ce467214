"""Reads the files of a run folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd.tracking.formatting import evaluation_tasks
from opd.tracking.jsonl import METRICS, SAMPLES, WEIGHTS, read_lines
from opd.tracking.line_shapes import Metrics, SampleLine, WeightLine

CONFIG = "config.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric at the steps where it was logged; nan stands for a number that was not finite."""

    steps: list[int]
    values: list[float]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def last(self) -> float | None:
        """The last value, None when there is none."""
        return self.values[-1] if self.values else None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """The accuracy on one task: before training, after it, at its best; and the teacher's."""

    task: str
    before: float
    after: float
    after_step: int
    best: float
    best_step: int
    teacher: float | None

    @property
    def gap_closed(self) -> float | None:
        """(after - before) / (teacher - before); None unless the teacher was better at the start."""
        if self.teacher is None or self.teacher <= self.before:
            return None
        return (self.after - self.before) / (self.teacher - self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One run folder: configuration, metrics by step, transcripts, weight records."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    choices: Mapping[str, str]
    about: Mapping[str, Any]
    rows: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    has_final: bool
    recorded: list[dict[str, Any]]

    def series(self, metric: str) -> Series:
        """The metric by step; empty when it was never logged."""
        rows = [row for row in self.rows if metric in row]
        return Series(
            steps=[row["step"] for row in rows],
            values=[math.nan if row[metric] is None else float(row[metric]) for row in rows],
        )

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, in the order of their first appearance."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if name != "step"]

    @property
    def tasks(self) -> list[str]:
        """The evaluation tasks."""
        return evaluation_tasks(self.metrics)

    def result(self, task: str) -> TaskResult | None:
        """Accuracy before, after and at its best; None when the task was never graded."""
        accuracy = self.series(f"eval/{task}/accuracy")
        if not accuracy:
            return None
        best = max(accuracy.values)
        return TaskResult(
            task=task,
            before=accuracy.values[0],
            after=accuracy.values[-1],
            after_step=accuracy.steps[-1],
            best=best,
            best_step=accuracy.steps[accuracy.values.index(best)],
            teacher=self.series(f"eval/{task}/teacher_accuracy").last,
        )

    @property
    def results(self) -> list[TaskResult]:
        """The results of all graded tasks."""
        results = (self.result(task) for task in self.tasks)
        return [result for result in results if result is not None]

    def wall(self) -> dict[int, float]:
        """Step to seconds since the start: the sum of time/step and time/eval so far."""
        seconds, wall = 0.0, {}
        for row in self.rows:
            seconds += (row.get("time/step") or 0.0) + (row.get("time/eval") or 0.0)
            wall[row["step"]] = seconds
        return wall

    @property
    def step(self) -> int:
        """The last logged step, 0 when there is none."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def planned(self) -> int | None:
        """train.steps of the configuration."""
        steps = flat(self.config).get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def status(self) -> str:
        """``finished``, or what went wrong in a few words."""
        if not self.rows:
            return "crashed before its first step"
        loss = self.series("loss/total")
        if loss and math.isnan(loss.values[-1]):
            return f"diverged at step {loss.steps[-1]}"
        if self.has_final or (self.planned is not None and self.step >= self.planned):
            return "finished"
        return f"unfinished: step {self.step}" + (f" of {self.planned}" if self.planned else "")

    @property
    def finished(self) -> bool:
        """Whether the run reached its planned last step."""
        return self.status == "finished"


def read_run(folder: str | Path) -> RunRecord:
    """The run in ``folder``; its metrics may still be empty.

    Raises ``ValueError`` when the folder is not a run's or its files cannot be understood.
    """
    root = Path(folder)
    for name in (CONFIG, METRICS):
        if not (root / name).is_file():
            raise ValueError(
                f"{root}: found no {name}; a run folder holds {CONFIG} and {METRICS}; "
                "give the folder that `opd train` wrote"
            )
    about = read_description(root / CONFIG)
    return RunRecord(
        name=root.resolve().name,
        folder=root,
        config=about["config"],
        choices=about.get("choices") or {},
        about={name: about.get(name) for name in ("command", "git", "versions")},
        rows=read_lines(root / METRICS, Metrics),
        samples=read_lines(root / SAMPLES, SampleLine),
        has_final=(root / "final").is_dir(),
        recorded=read_lines(root / WEIGHTS, WeightLine),
    )


def read_description(path: Path) -> dict[str, Any]:
    """A run's config.yaml: the resolved configuration, the choices, the versions.

    Raises ``ValueError`` when it is not readable or has no ``config`` section.
    """
    try:
        about = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML ({error}); restore it") from error
    if not isinstance(about, dict) or not isinstance(about.get("config"), dict):
        raise ValueError(f"{path}: found no `config` section; give a folder that `opd train` wrote")
    if not isinstance(about.get("choices") or {}, dict):
        raise ValueError(f"{path}: `choices` is no mapping of groups to names; restore it")
    return about


def read_started_run(folder: str | Path) -> RunRecord:
    """The run in ``folder``; a ``ValueError`` too when it has not logged a step yet."""
    run = read_run(folder)
    if not run.rows:
        raise ValueError(
            f"{run.folder / METRICS}: found no steps; a report needs at least one; "
            "wait for the first evaluation, or start the run again"
        )
    return run


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots; the leaves are scalars and lists."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
