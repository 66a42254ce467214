"""The run's own files: metrics, samples and weight records, one JSON object a line."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from opd.checked_json import read_json

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
WEIGHTS = "weights.jsonl"


class JsonlTracker:
    """A ``Tracker`` that appends to metrics.jsonl and samples.jsonl in ``folder``.

    ``resume_step``: the run resumes after this step, so lines of later steps are dropped, as is an
    incomplete last line after a crash; None: the run starts from the beginning and all earlier lines
    are dropped. A number that is not finite is written as null, because strict JSON has no nan.
    """

    def __init__(self, folder: str | Path, resume_step: int | None = None) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._last = -1 if resume_step is None else resume_step
        for name in (METRICS, SAMPLES):
            _drop_after(self._folder / name, self._last)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for one step; training and evaluation metrics of a step come in one call."""
        assert step > self._last, f"step {step} after step {self._last}: one line a step, in order"
        self._last = step
        row = {"step": step} | {name: _finite(value) for name, value in metrics.items()}
        _append(self._folder / METRICS, [row])

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """A few transcripts of one evaluation, one line each."""
        _append(self._folder / SAMPLES, [{"step": step, **sample} for sample in samples])

    def close(self) -> None:
        """Nothing to do: each call has written its lines."""


class WeightRecord:
    """Appends to weights.jsonl in ``folder``; lines after ``resume_step`` are dropped, as above."""

    def __init__(self, folder: Path, resume_step: int | None = None) -> None:
        self._path = folder / WEIGHTS
        _drop_after(self._path, -1 if resume_step is None else resume_step)

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        """The record of one step."""
        _append(self._path, [{"step": step, **row}])


def read_lines(path: Path, shape: type = dict[str, Any]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; an incomplete last line is ignored, an absent file has none.

    Raises ``ValueError`` naming file, line and field when another line is not an object with a ``step``,
    or does not have ``shape`` (see ``read_json``).
    """
    if not path.exists():
        return []
    *complete, rest = path.read_bytes().split(b"\n")
    rows = [
        _row(path, number, line, shape)
        for number, line in enumerate(complete, start=1)
        if line.strip()
    ]
    if rest.strip():
        try:
            rows.append(_row(path, len(complete) + 1, rest, shape))
        except ValueError:
            return rows
    return rows


def find_row_faults(rows: Sequence[Mapping[str, Any]], last: int) -> list[str]:
    """What is wrong with the rows of metrics.jsonl up to step ``last``: it has one a step, from 0 on."""
    steps = [row["step"] for row in rows if row["step"] <= last]
    counts = Counter(steps)
    faults = {
        "are missing": [step for step in range(last + 1) if step not in counts],
        "occur more than once": sorted(step for step, count in counts.items() if count > 1),
        "are out of order": [b for a, b in pairwise(steps) if b < a],
    }
    return [f"steps {_ranges(those)} {what}" for what, those in faults.items() if those]


def _ranges(steps: Sequence[int]) -> str:
    """Rising numbers in short: 3-5, 9."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][-1] + 1:
            found[-1] = [found[-1][0], step]
        else:
            found.append([step])
    return ", ".join("-".join(map(str, each)) for each in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    step: int


def _row(path: Path, number: int, line: bytes, shape: type) -> dict[str, Any]:
    place, remedy = f"{path}:{number}", "restore the file or remove that line"
    for required in (_Step, shape):
        read_json(line, required, place, remedy)
    return read_json(line, dict[str, Any], place, remedy)


def _drop_after(path: Path, step: int) -> None:
    """Rewrite ``path`` without the lines of later steps, atomically; metrics get one line a step."""
    if not path.exists():
        return
    scratch = path.with_name(f"{path.name}.part")
    with scratch.open("w", encoding="utf-8") as file:
        if step >= 0:
            rows = [row for row in read_lines(path) if row["step"] <= step]
            if path.name == METRICS:
                rows = [row for _, row in sorted({row["step"]: row for row in rows}.items())]
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)
