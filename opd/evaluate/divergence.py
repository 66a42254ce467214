"""How far the student is from its teacher, on prompts that it never learns from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from opd.config.loss import DivergenceLossConfig
from opd.interfaces import RolloutEngine, StudentScorer, Teacher
from opd.losses.divergence import Divergence
from opd.types import DivergenceKind, Evaluation, Prompt, Rollout, Sampling
from opd.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceEvaluator:
    """An ``Evaluator`` of what ``measure`` says about one sampled completion a prompt.

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
        """See ``Evaluator``; every step draws with the same seed."""
        share = self.prompts[self.world.rank :: self.world.size]
        sampling = Sampling(
            temperature=self.temperature, max_tokens=self.max_tokens, seed=self.seed
        )
        measured = self.measure(self.engine.generate(share, sampling))
        return Evaluation(metrics={f"eval/{self.task}/{k}": v for k, v in measured.items()})


def exact_reverse_kl(
    learner: StudentScorer, teacher: Teacher
) -> Callable[[Sequence[Rollout]], dict[str, float]]:
    """A ``measure``: the exact reverse KL of the learner to the teacher; collective."""
    loss = Divergence(DivergenceLossConfig(kind=DivergenceKind.reverse_kl))

    def measure(rollouts: Sequence[Rollout]) -> dict[str, float]:
        measured = learner.measure(teacher.score(rollouts), loss)
        return {"reverse_kl": measured["loss/reverse_kl"]}

    return measure
