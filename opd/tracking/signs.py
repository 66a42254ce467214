"""Signs in the metrics of a run that training goes wrong: each is a sentence, given once.

Thresholds are far outside what runs that learn have shown, so that a warning is worth a look.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from opd.tracking.console import SKIPPED
from opd.tracking.jsonl import find_row_faults
from opd.tracking.runs import RunRecord

WINDOW = 5
"""Steps that are averaged: a single odd batch is no sign."""
KL_GROWTH, KL_LEAST = 5.0, 0.5
"""A distillation loss falls. Five times its start, and half a nat a token more, is no noise of batches."""
SHORTER, LONGER = 0.2, 4.0
"""Lengths drift by tens of percent; a fifth is answers that stop at once, four times those that never do."""
ENTROPY_SHARE, ENTROPY_MOST = 0.1, 0.1
"""Distillation sharpens a student; a tenth of the entropy, below 0.1 nats, leaves nothing to sample."""
REPEATED = 0.5
"""Of the runs of four tokens in a completion, so many have been there before; prose repeats below a tenth."""
KL_METRICS = (
    "loss/reverse_kl",
    "loss/forward_kl",
    "loss/jsd",
    "loss/skew_kl",
    "loss/skew_reverse_kl",
    "loss/reverse_kl_k3",
    "loss/uld",
)

Row = Mapping[str, float | None]
Rule = Callable[[Sequence[Row], Sequence[Row]], str | None]
"""(the first ``WINDOW`` steps, the last ``WINDOW`` steps) -> what is wrong in the last ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What was seen, and the first step at whose end it was."""

    step: int
    sentence: str


def find_signs(rows: Iterable[Row]) -> list[Sign]:
    """The first appearance of each sign in the metrics of a run, in the order of steps."""
    watch = SignWatch()
    return [sign for row in rows for sign in watch.add(row)]


class SignWatch:
    """Reads metrics step by step and gives each sign once."""

    def __init__(self) -> None:
        self._first: list[Row] = []
        self._last: list[Row] = []
        self._seen: set[str] = set()

    def add(self, row: Row) -> list[Sign]:
        """The signs that the row of a step (its metrics and ``step``) shows for the first time."""
        step = row.get("step")
        if not step:  # the evaluation before training
            return []
        if len(self._first) < WINDOW:
            self._first.append(row)
        self._last = [*self._last, row][-WINDOW:]
        if len(self._last) < WINDOW:
            return []
        found = []
        for name, rule in RULES.items():
            sentence = None if name in self._seen else rule(self._first, self._last)
            if sentence is not None:
                self._seen.add(name)
                found.append(Sign(step=int(step), sentence=sentence))
        return found


class SignTracker:
    """A ``Tracker`` that shows each sign when it appears; ``earlier`` are the rows before a resume."""

    def __init__(self, show: Callable[[str], None], earlier: Iterable[Row] = ()) -> None:
        self._show = show
        self._watch = SignWatch()
        for row in earlier:
            self._watch.add(row)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show what the step's metrics show for the first time."""
        for sign in self._watch.add({**metrics, "step": step}):
            self._show(f"  warning: {sign.sentence}")

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Transcripts are not examined."""

    def close(self) -> None:
        """Nothing to do: each sign has been shown."""


def run_warnings(run: RunRecord) -> list[str]:
    """What a reader of the run should know: steps without a row, signs, skipped steps."""
    faults = find_row_faults(run.rows, run.step)
    skipped = run.series(SKIPPED).last
    return [
        *(f"metrics.jsonl: {fault}" for fault in faults),
        *(f"step {sign.step}: {sign.sentence}" for sign in find_signs(run.rows)),
        *(
            [f"{skipped:.0f} steps were skipped, because a loss or gradient norm was not finite"]
            if skipped
            else []
        ),
    ]


def _values(rows: Sequence[Row], metric: str) -> list[float]:
    values = (row.get(metric) for row in rows)
    return [value for value in values if value is not None and math.isfinite(value)]


def _start_and_now(
    first: Sequence[Row], last: Sequence[Row], metric: str
) -> tuple[float, float] | None:
    """The median of the first steps and the mean of the last ones; None where one is not known."""
    start, now = _values(first, metric), _values(last, metric)
    return (median(start), fmean(now)) if start and len(now) == WINDOW else None


def _kl_explosion(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    for metric in KL_METRICS:
        before, values = _values(first, metric), _values(last, metric)
        if before and len(values) == WINDOW:
            start, now = min(before), fmean(values)  # it may explode within the first steps
            if now > KL_GROWTH * start and now > start + KL_LEAST:
                return (
                    f"the divergence explodes: {metric} is {now:.3g} nats a token, and began at {start:.3g}: "
                    "lower optim.lr, or look at the samples"
                )
    return None


def _length_collapse(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    found = _start_and_now(first, last, "rollout/length")
    if found is None or found[1] >= SHORTER * found[0]:
        return None
    return (
        f"completions collapse: {found[1]:.1f} tokens, and began with {found[0]:.1f}: look at the samples, "
        "and at the end tokens of teacher and student"
    )


def _length_explosion(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    found = _start_and_now(first, last, "rollout/length")
    if found is None or found[1] <= LONGER * found[0]:
        return None
    return (
        f"completions grow: {found[1]:.1f} tokens, and began with {found[0]:.1f}: look at the samples, and "
        "at the end tokens of teacher and student"
    )


def _all_truncated(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    values = _values(last, "rollout/truncated")
    if len(values) < WINDOW or min(values) < 1:
        return None
    return (
        f"all completions of {WINDOW} steps were cut at rollout.max_tokens: raise it, or check that the "
        "student knows its end token"
    )


def _entropy_collapse(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    found = _start_and_now(first, last, "student/entropy")
    if found is None or found[1] >= min(ENTROPY_MOST, ENTROPY_SHARE * found[0]):
        return None
    return (
        f"the student's entropy collapses: {found[1]:.3g} nats a token, and began with {found[0]:.3g}: it "
        "samples the same completions again and again; lower optim.lr, or raise rollout.temperature"
    )


def _repetition(first: Sequence[Row], last: Sequence[Row]) -> str | None:
    values = _values(last, "rollout/repetition")
    if len(values) < WINDOW or fmean(values) <= REPEATED:
        return None
    return (
        f"completions repeat themselves: {fmean(values):.0%} of their four-token sequences have been there "
        "before: look at the samples"
    )


RULES: dict[str, Rule] = {
    "kl": _kl_explosion,
    "shorter": _length_collapse,
    "longer": _length_explosion,
    "truncated": _all_truncated,
    "entropy": _entropy_collapse,
    "repetition": _repetition,
}
