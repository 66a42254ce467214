"""The terminal: progress bars during a step, one aligned line after it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from opd.interfaces import Progress as ShownProgress
from opd.tracking.formatting import evaluation_tasks, number

_HEADER_EVERY = 20
SKIPPED = "optim/skipped_steps"
_NOT_FINITE = "  skipped: its loss or gradient norm is not finite (the log names the sample)"


@dataclass(frozen=True, slots=True)
class _Column:
    """One column of the table: a metric under a heading of two lines."""

    metric: str
    heading: str
    unit: str
    width: int
    style: str = ""


# With the step column this is 72 wide, so that it fits a terminal of 80 columns.
_COLUMNS = (
    _Column("loss/total", "loss", "", 8, "bold"),
    _Column("teacher/nll", "teacher", "nll", 7),
    _Column("rollout/length", "length", "tokens", 6),
    _Column("optim/grad_norm", "grad", "norm", 7),
    _Column("optim/lr", "lr", "", 7),
    _Column("time/rollout", "rollout", "s", 7, "dim"),
    _Column("time/teacher", "teacher", "s", 7, "dim"),
    _Column("time/learn", "learn", "s", 6, "dim"),
)
_REWARD = replace(_COLUMNS[1], metric="reward/mean", heading="reward", unit="mean")
"""In place of the teacher's column where no teacher scores."""
_STEP_WIDTH = 9
_WIDTH = 80
_EXTRAS = (
    ("mean_at_k", "mean@k"),
    ("reverse_kl", "KL"),
    ("length", "length"),
    ("truncated", "truncated"),
)


class ConsoleTracker:
    """A ``Tracker`` that prints one line for each step and one for each evaluated task.

    Share ``console`` with ``ConsoleProgress``, so that lines appear above the progress bars. Without a
    terminal the lines are plain text. The heading is repeated every 20 lines. ``earlier`` are the metrics of
    the steps before a resume, with which accuracies are compared.
    """

    def __init__(
        self, console: Console, steps: int, earlier: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        self._console = console
        self._steps = steps
        self._lines_since_heading = _HEADER_EVERY
        self._columns = _COLUMNS
        self._before: dict[str, float] = {}
        self._teacher: dict[str, float] = {}
        for metrics in earlier:
            for task in evaluation_tasks(metrics):
                self._compare(task, metrics)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for the training step, one for each evaluated task."""
        if any(column.metric in metrics for column in _COLUMNS):
            if _REWARD.metric in metrics and _COLUMNS[1].metric not in metrics:
                self._columns = (_COLUMNS[0], _REWARD, *_COLUMNS[2:])
            if self._lines_since_heading >= _HEADER_EVERY:
                self._print_heading()
            self._lines_since_heading += 1
            self._print(self._line(step, metrics))
            if SKIPPED in metrics and "optim/grad_norm" not in metrics:
                self._print(Text(_NOT_FINITE, style="yellow"))
        for task in evaluation_tasks(metrics):
            self._print(self._evaluation(step, task, metrics))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Transcripts are written to files and reports, not to the terminal."""

    def close(self) -> None:
        """Nothing to do: every line is printed at once."""

    def _print(self, line: Text) -> None:
        line.rstrip()
        if self._console.no_color:  # Rich leaves bold and dim in
            line = Text(line.plain)
        self._console.print(line, no_wrap=True, overflow="ignore", crop=False, soft_wrap=True)

    def _print_heading(self) -> None:
        self._lines_since_heading = 0
        for step, cells in (
            ("step", [column.heading for column in self._columns]),
            ("", [column.unit for column in self._columns]),
        ):
            line = Text(step.rjust(_STEP_WIDTH), style="cyan")
            for column, cell in zip(self._columns, cells, strict=True):
                line.append(f" {cell:>{column.width}}")
            self._print(line)

    def _line(self, step: int, metrics: Mapping[str, float]) -> Text:
        line = Text(f"{step}/{self._steps}".rjust(_STEP_WIDTH))
        for column in self._columns:
            value = number(metrics.get(column.metric))
            line.append(f" {value:>{column.width}}", style=column.style)
        return line

    def _compare(self, task: str, metrics: Mapping[str, Any]) -> None:
        """Remember a task's first accuracy and the teacher's."""
        accuracy = metrics.get(f"eval/{task}/accuracy")
        teacher = metrics.get(f"eval/{task}/teacher_accuracy")
        if accuracy is not None:
            self._before.setdefault(task, accuracy)
        if teacher is not None:
            self._teacher[task] = teacher

    def _evaluation(self, step: int, task: str, metrics: Mapping[str, float]) -> Text:
        def metric(name: str) -> float | None:
            return metrics.get(f"eval/{task}/{name}")

        self._compare(task, metrics)
        accuracy = metric("accuracy")
        parts = []
        if accuracy is not None:
            change = accuracy - self._before[task]
            parts.append(f"accuracy {accuracy:.3f}" + (f" ({change:+.3f})" if step else ""))
        if task in self._teacher:
            parts.append(f"teacher {self._teacher[task]:.3f}")
        for name, label in _EXTRAS:
            value = metric(name)
            if value is not None:
                parts.append(f"{label} {number(value)}")
        line = Text(f"{step}/{self._steps}".rjust(_STEP_WIDTH), style="bold green")
        line.append(f" {task}:")
        for part in parts:
            room = _WIDTH - len(line.plain.rsplit("\n", 1)[-1])
            line.append("  " if len(part) + 2 <= room else "\n" + " " * (_STEP_WIDTH + 3))
            line.append(part)
        return line


class ConsoleProgress:
    """A ``Progress``: bars with the remaining time, removed when done; nothing without a terminal.

    Contexts may be nested (steps outside, phases inside) and in several threads; the first starts the
    display, the last ends it.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = Lock()
        self._bars: Progress | None = None
        self._open = 0

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar named ``what`` of ``total`` units."""
        bars = self._enter()
        try:
            with _bar(bars, what, total) as advance:
                yield advance
        finally:
            self._leave()

    def _enter(self) -> Progress:
        with self._lock:
            if self._bars is None:
                self._bars = _bars(self._console)
                self._bars.start()
            self._open += 1
            return self._bars

    def _leave(self) -> None:
        with self._lock:
            self._open -= 1
            if self._bars is not None and not self._open:
                self._bars.stop()
                self._bars = None


class SilentProgress:
    """A ``Progress`` that shows nothing: for ranks other than 0, and for tests."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """No bar."""
        yield lambda amount: None


class CountedProgress:
    """A ``Progress`` that calls ``moved`` whenever the bar of another one might have advanced."""

    def __init__(self, shown: ShownProgress, moved: Callable[[], None]) -> None:
        self._shown, self._moved = shown, moved

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """The bar of the other."""
        with self._shown.track(what, total) as advance:

            def count(amount: int) -> None:
                self._moved()
                advance(amount)

            self._moved()
            yield count


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:>9}", style="cyan"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        expand=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _bar(bars: Progress, what: str, total: int) -> Iterator[Callable[[int], None]]:
    task = bars.add_task(what, total=total)
    try:
        yield lambda amount: bars.advance(task, amount)
    finally:
        bars.remove_task(task)
