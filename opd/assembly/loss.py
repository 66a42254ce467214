"""The loss, and what it asks of engine and teacher."""

from typing import TYPE_CHECKING

from opd.config.schema import Config
from opd.config.losses import DivergenceLossConfig, GrpoLossConfig, LossConfig, NllLossConfig, PolicyGradientLossConfig, Support
from opd.interfaces import Loss
from opd.types import Correction, Sampling, Surrogate, ScoreRequest

if TYPE_CHECKING:
    from opd.batch import LossReduction
    from opd.losses.token_weights import ImportanceCorrection, TokenWeights


def build_loss(config: LossConfig) -> Loss:
    """The pure function that the learner minimises."""
    from opd.losses.divergence import Divergence
    from opd.losses.nll import NegativeLogLikelihood
    from opd.losses.policy_gradient import PolicyGradient

    match config:
        case DivergenceLossConfig():
            loss = Divergence(
                kind=config.kind,
                beta=config.beta,
                skew=config.skew,
                clip=config.clip,
                intersect=config.support == Support.intersection,
                factors=_factors(config),
            )
            return _with_reward(loss, config)
        case NllLossConfig():
            return _with_reward(NegativeLogLikelihood(factors=_factors(config)), config)
        case PolicyGradientLossConfig():
            return PolicyGradient(
                surrogate=config.surrogate,
                teacher_weight=config.teacher_weight,
                reward_weight=config.reward_weight,
                advantage_clip=config.advantage_clip,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                factors=_factors(config),
            )
        case GrpoLossConfig():
            return PolicyGradient(
                surrogate=config.surrogate,
                teacher_weight=0.0,
                reward_weight=config.reward_weight,
                kl=config.kl,
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                factors=_factors(config),
            )
    raise AssertionError(f"no loss for {type(config).__name__}")


def _factors(config: LossConfig) -> "TokenWeights":
    from opd.losses.token_weights import TokenWeights, TokenWeighting

    weighting = TokenWeighting(weighting=config.weighting, gap_clip=config.gap_clip)
    return TokenWeights(weighting=weighting, correction=_corrector(config))


def _corrector(config: LossConfig) -> "ImportanceCorrection":
    from opd.losses.token_weights import ImportanceCorrection

    return ImportanceCorrection(
        correction=config.correction,
        cap=config.cap,
        band_low=config.band_low,
        band_high=config.band_high,
    )


def _with_reward(loss: Loss, config: LossConfig) -> Loss:
    """``loss`` and the reward beside it, which a weighting of tokens by the teacher does not touch."""
    from opd.losses.token_weights import TokenWeights
    from opd.losses.policy_gradient import PolicyGradient
    from opd.losses.with_reward import Rewarded

    if not config.reward_weight:
        return loss
    corrected = config.correction != Correction.none
    policy = PolicyGradient(
        surrogate=Surrogate.plain if corrected else Surrogate.clip,
        teacher_weight=0.0,
        reward_weight=config.reward_weight,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        factors=TokenWeights(correction=_corrector(config)),
    )
    return Rewarded(loss=loss, policy=policy)


def reckoning_of(config: Config) -> "LossReduction":
    """Which tokens count, and what a step's sum is divided by."""
    from opd.batch import LossReduction

    return LossReduction(
        normalise=config.loss.normalise,
        first_share=config.loss.first_share,
        max_tokens=config.rollout.max_tokens,
    )


def wants_sequence_gaps(loss: LossConfig) -> bool:
    """Whether the loss corrects whole completions."""
    return loss.correction in (Correction.sequence_truncate, Correction.sequence_mask)


def wanted_of(loss: LossConfig, temperature: float) -> ScoreRequest:
    """What the teacher must say for this loss."""
    match loss:
        case NllLossConfig() | GrpoLossConfig(kl=0.0):
            return ScoreRequest(sampled=False, temperature=temperature)
        case DivergenceLossConfig(support=Support.full):
            return ScoreRequest(full=True, temperature=temperature)
        case DivergenceLossConfig(support=support, k=k):
            return ScoreRequest(
                top_k=0 if support == Support.student_top_k else k,
                # an intersection needs the teacher's ids only: the engine's are in the rollouts
                rollout_support=support in (Support.student_top_k, Support.union),
                temperature=temperature,
            )
    return ScoreRequest(temperature=temperature)


def sampling_of(config: Config) -> Sampling:
    """How training rollouts are drawn; a support of the student's needs its ids from the engine."""
    support_k = 0
    if isinstance(config.loss, DivergenceLossConfig) and config.loss.support in (
        Support.student_top_k,
        Support.union,
        Support.intersection,
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
