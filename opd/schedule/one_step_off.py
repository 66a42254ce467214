"""schedule=one_step_off: the next step's rollouts are written and scored while the learner learns."""

import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from opd.faults import RunError
from opd.interfaces import StepBatch
from opd.schedule.writing import StepWriter
from opd.timing import timed
from opd.types import FinishReason, Prompt, Rollout

ARRAYS = ("token_ids", "logps", "support_ids")


class OneStepOff:
    """Implements ``Schedule`` with one batch ahead.

    The batch of step n + 1 is begun when the learner begins step n, by the weights after step n - 1: its
    rollouts are one step old when they are learned from. The first batch is not. Before weights are
    pushed or the engine evaluates, ``finish`` waits for the batch, so that one set of weights writes it.

    Args:
        writer: its engine and its teacher share nothing that changes with the learner's weights.
        last_step: no batch is written for later steps.
        max_staleness: in optimizer steps; RunError for a batch with an older rollout.
        rank, ranks: of this process; a checkpoint of another number of ranks has no batch for it.
    """

    def __init__(
        self, writer: StepWriter, *, last_step: int, max_staleness: int, rank: int, ranks: int
    ) -> None:
        self._writer = writer
        self._last_step = last_step
        self._max_staleness = max_staleness
        self._rank, self._ranks = rank, ranks
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="next-batch")
        self._next: Future[StepBatch] | None = None

    def batch(self, step: int) -> StepBatch:
        """See ``Schedule``; its metrics have ``schedule/staleness``."""
        batch = self._write(step) if self._next is None else self._next.result()
        self._next = None
        if step < self._last_step:
            self._next = self._thread.submit(self._write, step + 1)
        staleness = _staleness(batch, step)
        if staleness > self._max_staleness:
            raise RunError(
                f"step {step} would learn from completions that are {staleness} steps old, "
                f"allowed are schedule.max_staleness={self._max_staleness}"
            )
        return replace(batch, metrics={**batch.metrics, "schedule/staleness": float(staleness)})

    def _write(self, step: int) -> StepBatch:
        return self._writer.score(*self._writer.write(step))

    def finish(self) -> dict[str, float]:
        """See ``Schedule``; ``time/wait`` are the seconds. Raises what writing or scoring raised."""
        times: dict[str, float] = {}
        with timed(times, "time/wait"):
            if self._next is not None:
                self._next.result()
        return times

    def save(self, folder: str) -> None:
        """Write the rollouts of the batch that is ahead, for which the weights are gone."""
        if self._next is not None:
            _write(self._file(folder), self._next.result().rollouts)

    def load(self, folder: str, step: int) -> None:
        """Restore the batch after ``step``; its rollouts are scored again."""
        file = self._file(folder)
        if file.exists():
            rollouts = _read(file, self._writer.prompts.take(step))
            self._next = self._thread.submit(self._writer.score, rollouts, {"time/rollout": 0.0})

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"next_rollouts_{self._rank}_of_{self._ranks}.safetensors"


def _staleness(batch: StepBatch, step: int) -> int:
    """The most optimizer steps between the weights that wrote a rollout and those of ``step``."""
    # a data set's completions have no log-probs and no weights
    written = [r.version for r in batch.rollouts if not np.isnan(r.logps).any()]
    return step - 1 - min(written, default=step - 1)


def _write(file: Path, rollouts: Sequence[Rollout]) -> None:
    """Arrays one after the other, and a row of JSON for each rollout."""
    rows = [
        {
            "uid": r.prompt.uid,
            "sample": r.sample,
            "tokens": len(r.token_ids),
            "finish_reason": r.finish_reason.value,
            "version": r.version,
            "text": r.text,
        }
        for r in rollouts
    ]
    parts = {name: [getattr(r, name) for r in rollouts] for name in ARRAYS}
    arrays = {
        name: np.concatenate(values)
        for name, values in parts.items()
        if values and all(v is not None for v in values)
    }
    save_file(arrays, file, {"rollouts": json.dumps(rows)})


def _read(file: Path, prompts: Sequence[Prompt]) -> list[Rollout]:
    """What ``_write`` wrote, of ``prompts``."""
    by_uid = {prompt.uid: prompt for prompt in prompts}
    rollouts, start = [], 0
    with safe_open(file, "numpy") as stored:
        arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        rows = json.loads(stored.metadata()["rollouts"])
    for row in rows:
        part = slice(start, start + row["tokens"])
        start = part.stop
        rollouts.append(
            Rollout(
                prompt=by_uid[row["uid"]],
                finish_reason=FinishReason(row["finish_reason"]),
                version=row["version"],
                sample=row["sample"],
                text=row["text"],
                **{name: array[part] for name, array in arrays.items()},
            )
        )
    return rollouts
