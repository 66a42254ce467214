"""The loss, and what it asks of engine and teacher."""

from typing import TYPE_CHECKING

from opd.config import (
    Config,
    DivergenceLossConfig,
    LossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.interfaces import (
    Loss,
)
from opd.types import Sampling, Wanted

if TYPE_CHECKING:
    pass


def build_loss(config: LossConfig) -> Loss:
    """The pure function that the learner minimises."""
    from opd.losses import Divergence, PolicyGradient

    match config:
        case DivergenceLossConfig():
            return Divergence(kind=config.kind, beta=config.beta, skew=config.skew)
        case PolicyGradientLossConfig():
            return PolicyGradient(
                importance=config.importance,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                cap=config.cap,
                band_low=config.band_low,
                band_high=config.band_high,
                advantage_clip=config.advantage_clip,
            )
    raise AssertionError(f"no loss for {type(config).__name__}")


def wanted_of(loss: LossConfig, temperature: float) -> Wanted:
    """What the teacher must say for this loss."""
    match loss:
        case DivergenceLossConfig(support=Support.full):
            return Wanted(full=True, temperature=temperature)
        case DivergenceLossConfig(support=support, k=k):
            return Wanted(
                top_k=0 if support == Support.student_top_k else k,
                rollout_support=support != Support.teacher_top_k,
                temperature=temperature,
            )
    return Wanted(temperature=temperature)


def sampling_of(config: Config) -> Sampling:
    """How training rollouts are drawn; a support of the student's needs its ids from the engine."""
    support_k = 0
    if isinstance(config.loss, DivergenceLossConfig) and config.loss.support in (
        Support.student_top_k,
        Support.union,
    ):
        support_k = config.loss.k
    return Sampling(
        n=config.rollout.n,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        max_tokens=config.rollout.max_tokens,
        seed=config.seed,
        support_k=support_k,
    )
