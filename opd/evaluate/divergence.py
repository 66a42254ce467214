"""The divergence between student and teacher on held-out prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd.config.loss import DivergenceLossConfig
from opd.interfaces import RolloutEngine, StudentScorer, Teacher
from opd.losses.divergence import Divergence
from opd.types import DivergenceKind, Evaluation, Prompt, Rollout, Sampling
from opd.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceEvaluator:
    """An ``Evaluator`` that samples one completion a prompt and applies ``measure`` to them.

    Metrics ``eval/<task>/<name>``; ``measure`` takes this rank's rollouts and returns metrics already
    reduced over ranks (nats per token for a divergence).
    """

    task: str
    prompts: Sequence[Prompt]
    engine: RolloutEngine
    measure: Callable[[Sequence[Rollout]], dict[str, float]]
    world: World
    max_tokens: int
    temperature: float
    seed: int

    def evaluate(self, step: int) -> Evaluation:
        """Metrics reduced over ranks, collective; every step samples with the same seed."""
        share = self.prompts[self.world.rank :: self.world.size]
        sampling = Sampling(
            temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed
        )
        metrics = self.measure(self.engine.generate(share, sampling))
        return Evaluation(metrics={f"eval/{self.task}/{k}": v for k, v in metrics.items()})


def exact_reverse_kl(
    learner: StudentScorer, teacher: Teacher
) -> Callable[[Sequence[Rollout]], dict[str, float]]:
    """A ``measure``: the exact reverse KL, KL(learner || teacher), in nats per token; collective."""
    loss = Divergence(DivergenceLossConfig(kind=DivergenceKind.reverse_kl))

    def measure(rollouts: Sequence[Rollout]) -> dict[str, float]:
        metrics = learner.measure(teacher.score(rollouts), loss)
        return {"reverse_kl": metrics["loss/reverse_kl"]}

    return measure
