"""One step off: which weights write which batch, what waits, and what a checkpoint holds."""

from collections.abc import Sequence
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from opd.faults import RunError
from opd.schedule.one_step_off import OneStepOff
from opd.schedule.writing import StepWriter
from opd.types import FinishReason, Prompt, Rollout, Sampling, ScoredRollout, TeacherInfo


class Writers:
    """Prompts, engine and teacher; the engine's weights are those of ``version``."""

    def __init__(self) -> None:
        self.version = 0
        self.scored: list[int] = []
        self.may_write = Event()
        self.may_write.set()

    def take(self, step: int) -> list[Prompt]:
        return [Prompt(uid=f"{step}.{n}", token_ids=np.full(2, n, np.int32)) for n in range(2)]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        assert self.may_write.wait(60)
        rng = np.random.default_rng(sampling.seed)
        return [
            Rollout(
                prompt=prompt,
                token_ids=rng.integers(0, 9, 3 + sample).astype(np.int32),
                logps=rng.normal(size=3 + sample).astype(np.float32),
                finish_reason=FinishReason.stop,
                version=self.version,
                sample=sample,
                support_ids=rng.integers(0, 9, (3 + sample, 2)).astype(np.int32),
            )
            for prompt in prompts
            for sample in range(2)
        ]

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        self.scored.append(len(rollouts))
        return [ScoredRollout(rollout=r, logps=r.logps - 1) for r in rollouts]

    def info(self) -> TeacherInfo:
        raise AssertionError("a schedule does not ask")

    def head(self, name: str | None = None) -> np.ndarray:
        raise AssertionError("a schedule does not ask")


def schedule_of(
    writers: Writers, *, last_step: int = 9, max_staleness: int = 1, ranks: int = 1
) -> OneStepOff:
    sampling = Sampling(seed=1)
    writer = StepWriter(prompts=writers, engine=writers, teacher=writers, sampling=sampling)
    return OneStepOff(writer, last_step=last_step, max_staleness=max_staleness, rank=0, ranks=ranks)


def test_a_batch_is_written_by_the_weights_before_the_step_that_learns_from_another() -> None:
    writers = Writers()
    schedule = schedule_of(writers, last_step=4)
    seen = []
    for step in range(1, 5):
        batch = schedule.batch(step)
        seen.append(({r.version for r in batch.rollouts}, batch.metrics["schedule/staleness"]))
        schedule.finish()
        writers.version = step  # a push
    assert seen == [({0}, 0.0), ({0}, 1.0), ({1}, 1.0), ({2}, 1.0)]
    assert writers.scored == [4, 4, 4, 4], "nothing is written beyond the last step"


def test_the_next_batch_is_written_while_the_learner_learns_and_finish_waits_for_it() -> None:
    writers = Writers()
    schedule = schedule_of(writers)
    writers.may_write.set()
    schedule.batch(1)
    schedule.finish()
    writers.may_write.clear()
    schedule.batch(2)  # returns although batch 3 cannot be written yet
    assert writers.scored == [4, 4]
    writers.may_write.set()
    schedule.finish()
    assert writers.scored == [4, 4, 4]


def test_a_resumed_schedule_learns_from_the_rollouts_of_the_checkpoint(tmp_path: Path) -> None:
    writers = Writers()
    schedule = schedule_of(writers)
    schedule.batch(1)
    schedule.finish()
    writers.version = 1
    schedule.save(str(tmp_path))
    uninterrupted = schedule.batch(2)
    resumed_writers = Writers()
    resumed_writers.version = 1
    resumed = schedule_of(resumed_writers)
    resumed.load(str(tmp_path), 1)
    again = resumed.batch(2)
    for one, other in zip(uninterrupted.scored, again.scored, strict=True):
        a, b = one.rollout, other.rollout
        assert (a.prompt.uid, a.sample, a.version) == (b.prompt.uid, b.sample, b.version)
        assert (a.finish_reason, b.version) == (b.finish_reason, 0)
        for name in ("token_ids", "logps", "support_ids"):
            left, right = getattr(a, name), getattr(b, name)
            assert left.dtype == right.dtype
            assert np.array_equal(left, right)
        assert one.logps is not None
        assert np.array_equal(one.logps, other.logps)


@pytest.mark.parametrize("wrote", [None, 2])
def test_a_checkpoint_without_a_batch_for_this_rank_is_no_obstacle(
    tmp_path: Path, wrote: int | None
) -> None:
    writers = Writers()
    if wrote is not None:
        other = schedule_of(writers, ranks=wrote)
        other.batch(1)
        other.finish()
        other.save(str(tmp_path))
    writers.version = 3
    schedule = schedule_of(writers)
    schedule.load(str(tmp_path), 3)
    assert schedule.batch(4).rollouts[0].prompt.uid == "3.0"


def test_rollouts_that_are_too_old_end_the_run() -> None:
    writers = Writers()
    schedule = schedule_of(writers)
    schedule.batch(1)
    schedule.finish()
    schedule.batch(2)
    schedule.finish()
    with pytest.raises(RunError, match="2 steps old"):
        schedule.batch(3)  # nothing was pushed


def test_a_failure_of_the_engine_reaches_the_loop() -> None:
    writers = Writers()
    schedule = schedule_of(writers)
    schedule.batch(1)
    schedule.finish()

    def fail(prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        raise ConnectionError("the rollout server is gone")

    writers.generate = fail
    schedule.batch(2)
    with pytest.raises(ConnectionError, match="gone"):
        schedule.finish()
