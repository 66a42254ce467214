"""The algorithm on one page: the student writes, the teacher scores, the student learns, and the
new weights go back to the engine that writes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from opd.faults import Interrupted
from opd.interfaces import Evaluator, Learner, Schedule, Tracker, WeightSync
from opd.phases import RunPhase
from opd.rollout.repetition import repeated_share
from opd.timing import timed
from opd.types import FinishReason, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """One run: its clients and a few numbers.

    ``schedule`` has the engine write and the teacher score.
    ``verify`` compares engine and learner and raises when they differ, ``watch`` raises when a step's
    metrics show it; ``save`` writes a checkpoint
    of the step it is given, with its metrics, ``is_best`` says that these need one; ``total`` sums counts
    over ranks. ``interrupted`` says, on all ranks alike, whether the run shall end before its last step;
    ``enter`` is told every phase as it begins.
    ``*_every`` = 0 leaves what is always done: verify and evaluate before training, evaluate and
    save at the last step.
    """

    schedule: Schedule
    learner: Learner
    sync: WeightSync
    evaluator: Evaluator | None
    tracker: Tracker
    verify: Callable[[], dict[str, float]]
    watch: Callable[[Mapping[str, float]], None]
    save: Callable[[int, Mapping[str, float]], None]
    is_best: Callable[[Mapping[str, float]], bool]
    interrupted: Callable[[], bool]
    total: Callable[[dict[str, float]], dict[str, float]]
    enter: Callable[[RunPhase, int], None]
    steps: int
    eval_every: int
    save_every: int
    verify_every: int

    def run(self, start: int) -> None:
        """Continue from ``start`` finished steps to ``steps``; step 0 is the evaluation before training.

        Raises Interrupted after a saved step when the run is interrupted.
        """
        self.enter(RunPhase.sync, start)
        pushed = self.sync.push(self.learner.weights(), start)
        first = dict(pushed) | self.verify()
        if start == 0:
            first |= self._evaluated(0)
            self.tracker.log(0, first)
        for step in range(start + 1, self.steps + 1):
            metrics = self._step(step)
            if self._due(step, self.verify_every):
                metrics |= self.verify()
            if self._due(step, self.eval_every) or step == self.steps:
                metrics |= self._evaluated(step)
            self.tracker.log(step, metrics)
            ends = step < self.steps and self.interrupted()
            last = step == self.steps or ends
            if self._due(step, self.save_every) or last or self.is_best(metrics):
                self.enter(RunPhase.checkpoint, step)
                self.save(step, metrics)
            if ends:
                raise Interrupted(step)

    def _step(self, step: int) -> dict[str, float]:
        times: dict[str, float] = {}
        with timed(times, "time/step"):
            self.enter(RunPhase.rollout, step)
            batch = self.schedule.batch(step)
            self.enter(RunPhase.learn, step)
            with timed(times, "time/learn"):
                report = self.learner.step(batch.scored)
            self.watch(report.metrics)
            self.enter(RunPhase.sync, step)
            waited = self.schedule.finish()
            with timed(times, "time/sync"):
                pushed = self.sync.push(self.learner.weights(), report.version)
        written = self._rollout_metrics(batch.rollouts)
        return {**report.metrics, **written, **pushed, **batch.metrics, **waited, **times}

    def _rollout_metrics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        counts = self.total(
            {
                "tokens": float(sum(len(r.token_ids) for r in rollouts)),
                "truncated": float(sum(r.finish_reason == FinishReason.length for r in rollouts)),
                "repeated": sum(repeated_share(r.token_ids) for r in rollouts),
                "rollouts": float(len(rollouts)),
            }
        )
        return {
            "rollout/length": counts["tokens"] / counts["rollouts"],
            "rollout/truncated": counts["truncated"] / counts["rollouts"],
            "rollout/repetition": counts["repeated"] / counts["rollouts"],
            "tokens/generated": counts["tokens"],
        }

    def _evaluated(self, step: int) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        self.enter(RunPhase.evaluate, step)
        times: dict[str, float] = {}
        with timed(times, "time/eval"):
            evaluation = self.evaluator.evaluate(step)
        self.tracker.log_samples(step, evaluation.samples)
        return {**evaluation.metrics, **times}

    @staticmethod
    def _due(step: int, every: int) -> bool:
        return every > 0 and step % every == 0
