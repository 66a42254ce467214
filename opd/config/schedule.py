"""``schedule``: whether rollouts are written before the learner learns, or beside it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.config.fields import bounded
from opd.config.loss import PolicyGradientLossConfig
from opd.config.rollout import TransformersRolloutConfig
from opd.config.teacher import SelfTeacherConfig, ServedTeacherConfig
from opd.types import Correction, Surrogate

if TYPE_CHECKING:
    from opd.config.schema import Config


@dataclass(kw_only=True, slots=True)
class ScheduleConfig:
    """Write, score and learn one after the other; every rollout is of the newest weights."""


@dataclass(kw_only=True, slots=True)
class OneStepOffConfig(ScheduleConfig):
    """Write and score the next step's rollouts while the learner learns; they are one step old."""

    max_staleness: int = bounded(1, least=1)
    """Optimizer steps between the weights that wrote a rollout and those that learn; more ends the run."""


CHOICES = {"sync": ScheduleConfig, "one_step_off": OneStepOffConfig}


def old_rollouts_are_corrected(config: "Config") -> str | None:
    """The loss of a rollout by older weights is weighted by its importance ratio."""
    if not isinstance(config.schedule, OneStepOffConfig):
        return None
    clips = (
        isinstance(config.loss, PolicyGradientLossConfig)
        and config.loss.surrogate == Surrogate.clip
    )
    if config.loss.correction == Correction.none and not clips:
        return (
            "schedule=one_step_off learns from rollouts of older weights and loss.correction=none: use "
            "loss.correction=truncate, or schedule=sync"
        )
    return None


def nothing_beside_the_learner_changes(config: "Config") -> str | None:
    """Engine and teacher work in another thread than the learner."""
    if not isinstance(config.schedule, OneStepOffConfig):
        return None
    if isinstance(config.teacher, SelfTeacherConfig):
        return (
            "schedule=one_step_off scores while the learner learns, and teacher=self changes with it: use "
            "another teacher, or schedule=sync"
        )
    if isinstance(config.teacher, ServedTeacherConfig) and config.teacher.sleep:
        return (
            "schedule=one_step_off scores while the learner learns, and teacher.sleep=true has the teacher "
            "asleep then: use teacher.sleep=false on cards of its own, or schedule=sync"
        )
    if isinstance(config.rollout, TransformersRolloutConfig) and config.train.dropout:
        return (
            "schedule=one_step_off with rollout=transformers draws from the random state of dropout: use "
            "train.dropout=false, rollout=vllm or rollout=server"
        )
    return None


RULES = (old_rollouts_are_corrected, nothing_beside_the_learner_changes)
