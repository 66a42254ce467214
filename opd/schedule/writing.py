"""The scored rollouts of one step, whoever waits for them."""

from dataclasses import dataclass, replace

from opd.interfaces import PromptStream, RolloutEngine, StepBatch, Teacher
from opd.timing import timed
from opd.types import Rollout, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWriter:
    """The engine completes a step's prompts, and the teacher scores the completions."""

    prompts: PromptStream
    engine: RolloutEngine
    teacher: Teacher
    sampling: Sampling

    def write(self, step: int) -> tuple[list[Rollout], dict[str, float]]:
        """The rollouts of optimizer step ``step`` (from 1), by the weights that the engine has; seconds."""
        times: dict[str, float] = {}
        with timed(times, "time/rollout"):
            prompts = self.prompts.take(step - 1)
            seed = self.sampling.seed * 1_000_003 + step
            rollouts = self.engine.generate(prompts, replace(self.sampling, seed=seed))
        return rollouts, times

    def score(self, rollouts: list[Rollout], times: dict[str, float]) -> StepBatch:
        """The batch of rollouts that are written; ``times`` are seconds spent on them so far."""
        with timed(times, "time/teacher"):
            scored = self.teacher.score(rollouts)
        return StepBatch(scored=scored, metrics=times)
