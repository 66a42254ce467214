"""What writes and scores the batch of a step, and when."""

from collections.abc import Callable

from opd.assembly.rollout import build_writer, engine_sleeps
from opd.assembly.teacher import Teachers
from opd.config.rollout import VllmRolloutConfig, training_sampling
from opd.config.schedule import OneStepOffConfig
from opd.config.schema import Config
from opd.data.prompt_sets import PromptSets
from opd.data.stream import ShuffledPrompts
from opd.interfaces import RolloutEngine, Schedule
from opd.phases import RunPhase
from opd.schedule.one_step_off import OneStepOff
from opd.schedule.synchronous import Synchronous
from opd.schedule.writing import StepWriter
from opd.world import World


def build_step_writer(
    config: Config, prompts: PromptSets, engine: RolloutEngine, teachers: Teachers, world: World
) -> StepWriter:
    """The training prompts of this rank, what completes them, and the teacher of the loss."""
    return StepWriter(
        prompts=ShuffledPrompts(
            prompts.train,
            config.train.prompts_per_step,
            config.seed,
            world.rank,
            world.size,
            prompts.groups,
        ),
        engine=build_writer(config, engine),
        teacher=teachers.training,
        sampling=training_sampling(config),
    )


def build_schedule(
    config: Config, writer: StepWriter, enter: Callable[[RunPhase, int], None], world: World
) -> Schedule:
    """The schedule of a run; ValueError where the engine cannot write beside the learner.

    ``enter`` is told the phases that are the schedule's.
    """
    if not isinstance(config.schedule, OneStepOffConfig):
        return Synchronous(writer, enter)
    if isinstance(config.rollout, VllmRolloutConfig) and engine_sleeps(config.rollout, world):
        raise ValueError(
            "schedule=one_step_off writes while the learner learns, and rollout.enable_sleep_mode=true has "
            "the engine asleep then: use rollout=server on cards of its own, or schedule=sync"
        )
    return OneStepOff(
        writer,
        last_step=config.train.steps,
        max_staleness=config.schedule.max_staleness,
        rank=world.rank,
        ranks=world.size,
    )
