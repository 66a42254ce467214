"""The evaluators of a run, and the check that engine and learner agree."""

from collections.abc import Callable, Sequence
from functools import partial

from opd.config.rollout import DatasetRolloutConfig, training_sampling
from opd.config.schedule import OneStepOffConfig
from opd.config.schema import Config
from opd.config.sync import gap_bound, watched_bound
from opd.data.prompt_sets import PromptSets
from opd.data.tokenizer import StudentTokenizer
from opd.evaluate.divergence import DivergenceEvaluator, exact_reverse_kl
from opd.evaluate.evaluator import Evaluators, TaskEvaluator
from opd.evaluate.grade import grader
from opd.interfaces import Evaluator, RolloutEngine, StudentScorer, Teacher
from opd.sync.verify import SyncCheck
from opd.types import Rollout
from opd.world import World

VERIFY_PROMPTS = 4
"""Training prompts of each rank on which engine and learner are compared."""


def build_evaluator(
    config: Config,
    prompts: PromptSets,
    tokenizer: StudentTokenizer,
    engine: RolloutEngine,
    world: World,
    *,
    teacher: Teacher | None = None,
    measure: Callable[[Sequence[Rollout]], dict[str, float]] | None = None,
    teacher_accuracy: float | None = None,
) -> Evaluator | None:
    """The evaluator of ``config.eval``; None without held-out prompts or without an engine."""
    if isinstance(config.rollout, DatasetRolloutConfig):
        return None
    tasks: list[Evaluator] = []
    if prompts.eval:
        tasks.append(
            TaskEvaluator(
                config.eval,
                prompts=prompts.eval,
                engine=engine,
                decode=tokenizer.decode,
                grade=grader(config.eval.grader.value, config.eval.marker),
                world=world,
                max_tokens=config.eval.max_tokens or config.rollout.max_tokens,
                seed=config.seed,
                teacher=teacher,
                teacher_accuracy=teacher_accuracy,
            )
        )
    if prompts.divergence and measure is not None:
        tasks.append(
            DivergenceEvaluator(
                task=config.eval.task,
                prompts=prompts.divergence,
                engine=engine,
                measure=measure,
                world=world,
                max_tokens=config.rollout.max_tokens,
                temperature=config.rollout.temperature,
                seed=config.seed,
            )
        )
    return Evaluators(tasks=tasks) if tasks else None


def build_divergence_measure(
    learner: StudentScorer, teacher: Teacher | None
) -> Callable[[Sequence[Rollout]], dict[str, float]] | None:
    """Exact reverse KL of the learner to the teacher in nats per token; None without a teacher."""
    if teacher is None:
        return None
    return exact_reverse_kl(learner, teacher)


def build_sync_check(
    config: Config,
    prompts: PromptSets,
    engine: RolloutEngine,
    learner: StudentScorer,
    rounding: float | None,
    world: World,
) -> SyncCheck | None:
    """A comparison of engine and learner on a few training prompts; None without an engine.

    ``rounding``: see ``gap_bound``; ``sync.max_gap`` replaces all bounds.
    """
    if isinstance(config.rollout, DatasetRolloutConfig):
        return None
    given, precision = config.sync.max_gap, config.train.precision
    bound = given or gap_bound(precision, rounding)
    return SyncCheck(
        engine,
        learner,
        prompts.train[world.rank :: world.size][:VERIFY_PROMPTS],
        training_sampling(config),
        bound=bound,
        step_bound=None if given else partial(watched_bound, precision, bound),
        world=world,
    )


def watches(config: Config) -> bool:
    """Whether the tokens of a step have the learner's log-probs by right.

    They have without dropout, with nothing truncated, and where the newest weights wrote them.
    """
    if isinstance(config.schedule, OneStepOffConfig):
        return False
    sampling = training_sampling(config)
    return not config.train.dropout and sampling.top_p == 1.0 and sampling.top_k <= 0
