"""Who looks on: examinations, checks, records and trackers."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from opd.assembly.loss import sampling_of
from opd.assembly.text import Prompts, Text
from opd.config.schema import Config
from opd.config.writing import DatasetRolloutConfig
from opd.config.training import Precision
from opd.config.keeping import WandbConfig, WeightRecordConfig
from opd.interfaces import (
    Evaluator,
    Progress,
    StudentScorer,
    RolloutEngine,
    Teacher,
    Tracker,
)
from opd.types import Rollout

if TYPE_CHECKING:
    from opd.train.record import Write
    from opd.world import World


def build_evaluator(
    config: Config,
    prompts: Prompts,
    text: Text,
    engine: RolloutEngine,
    world: "World",
    *,
    teacher: Teacher | None = None,
    measure: Callable[[Sequence[Rollout]], dict[str, float]] | None = None,
    teacher_accuracy: float | None = None,
) -> Evaluator | None:
    """The examination of ``config.eval``; None when there is nothing to ask."""
    from opd.evaluate.divergence import DivergenceEvaluator
    from opd.evaluate.evaluator import Evaluators, TaskEvaluator
    from opd.evaluate.grade import grader

    if isinstance(config.rollout, DatasetRolloutConfig):
        return None
    tasks: list[Evaluator] = []
    if prompts.eval:
        tasks.append(
            TaskEvaluator(
                task=config.eval.task,
                prompts=prompts.eval,
                engine=engine,
                decode=text.decode,
                grade=grader(config.eval.grader.value, config.eval.marker),
                world=world,
                max_tokens=config.eval.max_tokens or config.rollout.max_tokens,
                seed=config.seed,
                k=config.eval.k,
                temperature=config.eval.temperature,
                samples=config.eval.samples,
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


VERIFY_PROMPTS = 4


# Mean nats. Measured on SmolLM2-135M, 30 layers, bf16 on both sides: 0.034, with weight noise 0.048;
# each side is 0.022-0.039 from float32. A tied head that was not packed anew makes about 1.
DEFAULT_GAP = {Precision.fp32: 1e-3, Precision.bf16: 0.15, Precision.pure_bf16: 0.15}


def build_sync_check(
    config: Config, prompts: Prompts, engine: RolloutEngine, learner: StudentScorer, world: "World"
) -> Callable[[], dict[str, float]]:
    """Compares engine and learner on a few training prompts of each rank, where there is an engine."""
    from opd.sync.verify import SyncCheck

    if isinstance(config.rollout, DatasetRolloutConfig):
        return dict
    check = SyncCheck(
        engine,
        learner,
        prompts.train[world.rank :: world.size][:VERIFY_PROMPTS],
        sampling_of(config),
        bound=config.sync.max_gap or DEFAULT_GAP[config.train.precision],
        world=world,
    )
    return check.verify


def build_weight_file(
    config: Config, folder: Path, world: "World", found: tuple[Path, int] | None
) -> "Write":
    """Where record=weights writes; ``found`` is the checkpoint that the run goes on from."""
    from opd.tracking.jsonl import WeightRecord

    if not world.is_main or not isinstance(config.record, WeightRecordConfig):
        return lambda step, row: None
    return WeightRecord(folder, None if found is None else found[1]).append


def build_console(world: "World", terminal: TextIO) -> tuple[Any, Progress]:
    """A rich console and its bars on rank 0; silence elsewhere."""
    from rich.console import Console

    from opd.tracking.console import ConsoleProgress, SilentProgress

    console = Console(file=terminal, quiet=not world.is_main)
    return console, ConsoleProgress(console) if world.is_main else SilentProgress()


def build_trackers(
    config: Config,
    folder: Path,
    resolved: dict[str, Any],
    console: Any,
    world: "World",
    found: tuple[Path, int] | None,
) -> Tracker:
    """Files always, the console always, Weights & Biases when asked; nothing but on rank 0.

    ``found`` is the checkpoint that the run goes on from.
    """
    from opd.tracking.console import ConsoleTracker
    from opd.tracking.fanout import Trackers
    from opd.tracking.jsonl import JsonlTracker
    from opd.tracking.wandb import WandbTracker

    if not world.is_main:
        return Trackers()
    trackers: list[Tracker] = [
        JsonlTracker(folder, None if found is None else found[1]),
        ConsoleTracker(console, config.train.steps),
    ]
    if isinstance(config.tracking, WandbConfig):
        trackers.append(
            WandbTracker(
                project=config.tracking.project,
                name=config.run.name,
                folder=folder,
                config=resolved,
                mode=config.tracking.mode.value,
            )
        )
    return Trackers(trackers)
