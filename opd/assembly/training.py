"""One rank of a run, built in the order engine, model, teacher, learner."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from opd.assembly.evaluate import (
    build_divergence_measure,
    build_evaluator,
    build_sync_check,
    watches,
)
from opd.assembly.learner import build_learner
from opd.assembly.model import build_model, measure_rounding, read_run_mask
from opd.assembly.rollout import (
    EngineInputs,
    build_engine,
    build_first_sync,
    build_sync,
)
from opd.assembly.schedule import build_schedule, build_step_writer
from opd.assembly.teacher import Teachers, build_teachers
from opd.assembly.tracking import build_console, build_trackers, build_weight_record
from opd.config.save import best_metric
from opd.config.schema import Config
from opd.config.train import last_step
from opd.data.prompt_sets import PromptSets, read_prompt_sets
from opd.data.tokenizer import StudentTokenizer, read_student_tokenizer
from opd.heartbeat import Heartbeat
from opd.interfaces import Evaluator, Progress, RolloutEngine, Schedule, Tracker, WeightSync
from opd.loop import Loop
from opd.schedule.writing import StepWriter
from opd.sync.verify import SyncCheck
from opd.teacher.vocabulary import read_vocabulary
from opd.train.checkpoints import BestCheckpoint, newest_checkpoint, write_checkpoint
from opd.train.learner import StudentLearner
from opd.world import World, join_world


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A rank ready to run: the loop, its parts, and the checkpoint to resume from.

    ``layout`` is a sentence about the rows of micro-batches. ``writer`` is what the loop's schedule uses.
    """

    loop: Loop
    learner: StudentLearner
    model: torch.nn.Module
    teachers: Teachers
    tokenizer: StudentTokenizer
    prompts: PromptSets
    world: World
    checkpoint: tuple[Path, int] | None
    sync_check: SyncCheck | None
    first_sync: WeightSync
    layout: str
    writer: StepWriter

    @property
    def start(self) -> int:
        """The number of finished steps."""
        return 0 if self.checkpoint is None else self.checkpoint[1]

    def resume(self) -> None:
        """Load the checkpoint, if there is one; collective."""
        if self.checkpoint is None:
            return
        folder, step = self.checkpoint
        self.learner.load(str(folder))
        if self.learner.version != step:
            raise ValueError(
                f"the checkpoint {folder} holds the states of step {self.learner.version}: give the folder "
                "its own name back, or delete it to resume from another one"
            )
        if self.teachers.average is not None:
            self.teachers.average.load(str(folder), step)
        self.loop.schedule.load(str(folder), step)

    def check_sync(self) -> float | None:
        """The gap in nats after a push of changed weights, which the loop replaces; None without an engine.

        Raises SyncMismatch when a weight does not reach the engine; collective.
        """
        if self.sync_check is None:
            return None
        return self.sync_check.verify_every_weight(self.learner, self.first_sync)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """What the loop connects."""

    tokenizer: StudentTokenizer
    prompts: PromptSets
    engine: RolloutEngine
    sync: WeightSync
    teachers: Teachers
    learner: StudentLearner
    sync_check: SyncCheck | None
    writer: StepWriter
    world: World


def build_training(
    config: Config,
    folder: Path,
    resolved: dict[str, Any],
    terminal: TextIO,
    teacher_accuracy: float | None,
    stop: Callable[[], bool] = bool,
    heartbeat: Heartbeat | None = None,
) -> Training:
    """Build everything of this rank; collective. Raises ValueError for configuration errors.

    ``resolved`` is the configuration as plain data, for the trackers, ``teacher_accuracy`` that of the
    teacher, if known. ``stop`` says whether this process shall end; ``heartbeat`` shows what it does.
    """
    world = join_world()
    console, progress = build_console(world, terminal, heartbeat)
    tokenizer = read_student_tokenizer(config.student, config.data.chat_template)
    prompts = read_prompt_sets(config, tokenizer)
    checkpoint, resumed = _find_checkpoint(folder, world)
    mask = read_run_mask(config, folder)
    inputs = _engine_inputs(config, tokenizer, prompts, world, progress)
    engine, sync = build_engine(inputs, mask)
    model, parameter_mask, own = build_model(config, mask, world, prompts.probe)
    rounding = measure_rounding(config, model, prompts.probe)
    vocabulary = read_vocabulary(tokenizer.tokenizer, tokenizer.vocab_size)
    teachers = build_teachers(config, model, tokenizer, vocabulary, world, progress)
    record = build_weight_record(config, folder, world, resumed)
    learner, layout = build_learner(
        config, model, parameter_mask, teachers, tokenizer, world, progress, record, own
    )
    parts = _Parts(
        tokenizer=tokenizer,
        prompts=prompts,
        engine=engine,
        sync=sync,
        teachers=teachers,
        learner=learner,
        sync_check=build_sync_check(config, prompts, engine, learner, rounding, world),
        writer=build_step_writer(config, prompts, engine, teachers, world),
        world=world,
    )
    tracker = build_trackers(config, folder, resolved, console, world, resumed)
    return Training(
        loop=_build_loop(config, folder, parts, teacher_accuracy, tracker, stop, heartbeat),
        learner=learner,
        model=model,
        teachers=teachers,
        tokenizer=tokenizer,
        prompts=prompts,
        world=world,
        checkpoint=checkpoint,
        sync_check=parts.sync_check,
        first_sync=build_first_sync(sync),
        layout=layout,
        writer=parts.writer,
    )


def _engine_inputs(
    config: Config,
    tokenizer: StudentTokenizer,
    prompts: PromptSets,
    world: World,
    progress: Progress,
) -> EngineInputs:
    return EngineInputs(
        config=config,
        model=config.student.model,
        tokenizer=tokenizer,
        max_length=prompts.max_length,
        world=world,
        progress=progress,
    )


def _find_checkpoint(folder: Path, world: World) -> tuple[tuple[Path, int] | None, int | None]:
    """The checkpoint to resume from and its step, once rank 0 has set damaged ones aside; collective."""
    world.barrier()
    found = newest_checkpoint(folder)
    return found, None if found is None else found[1]


def _build_evaluator(
    config: Config, parts: _Parts, teacher_accuracy: float | None
) -> Evaluator | None:
    return build_evaluator(
        config,
        parts.prompts,
        parts.tokenizer,
        parts.engine,
        parts.world,
        teacher=parts.teachers.sampled,
        measure=build_divergence_measure(parts.learner, parts.teachers.whole),
        teacher_accuracy=teacher_accuracy,
    )


def _build_loop(
    config: Config,
    folder: Path,
    parts: _Parts,
    teacher_accuracy: float | None,
    tracker: Tracker,
    stop: Callable[[], bool],
    heartbeat: Heartbeat | None,
) -> Loop:
    teachers, world = parts.teachers, parts.world
    check = parts.sync_check
    enter = heartbeat.enter if heartbeat is not None else lambda phase, step: None
    schedule = build_schedule(config, parts.writer, enter, world)
    metric = best_metric(config)
    best = None if metric is None else BestCheckpoint(folder, metric)
    return Loop(
        schedule=schedule,
        learner=parts.learner,
        sync=build_sync(config, parts.sync, teachers.average),
        evaluator=_build_evaluator(config, parts, teacher_accuracy),
        tracker=tracker,
        verify=dict if check is None else check.verify,
        watch=check.watch if check is not None and watches(config) else lambda metrics: None,
        save=_saver(config, folder, parts.learner, teachers, schedule, world, best),
        is_best=lambda metrics: best is not None and _any_rank(world, best.needs_saving(metrics)),
        interrupted=lambda: _any_rank(world, stop()),
        total=world.sum,
        enter=enter,
        steps=last_step(config),
        eval_every=config.eval.every,
        save_every=config.save.every,
        verify_every=config.sync.verify_every,
    )


def _any_rank(world: World, flag: bool) -> bool:
    """Whether ``flag`` is set on some rank; collective."""
    return world.max({"flag": float(flag)})["flag"] > 0


def _saver(
    config: Config,
    folder: Path,
    learner: StudentLearner,
    teachers: Teachers,
    schedule: Schedule,
    world: World,
    best: BestCheckpoint | None,
) -> Callable[[int, Mapping[str, float]], None]:
    """A function that writes the checkpoint of a step; collective."""

    def save_state(partial: str) -> None:
        learner.save(partial)
        if teachers.average is not None and world.is_main:
            teachers.average.save(partial)
        schedule.save(partial)

    def save(step: int, metrics: Mapping[str, float]) -> None:
        write_checkpoint(
            folder,
            step,
            save_state,
            keep=config.save.keep,
            world=world,
            best=best,
            metrics=metrics,
        )

    return save
