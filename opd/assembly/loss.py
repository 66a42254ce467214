"""The loss of a run."""

from opd.batch import LossReduction
from opd.config.functions import load_function
from opd.config.loss import (
    DivergenceLossConfig,
    FunctionLossConfig,
    LossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
)
from opd.config.schema import Config
from opd.config.uld import UldLossConfig
from opd.interfaces import Loss
from opd.losses.divergence import Divergence
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.losses.uld import UniversalLogitDistillation
from opd.losses.with_reward import WithReward, reward_policy
from opd.spans import CommonVocabulary


def build_loss(config: LossConfig, common: CommonVocabulary | None = None) -> Loss:
    """The function that the learner minimises: the loss, plus the reward's part if it has a weight.

    ``common``: the tokens that a teacher with its own tokenizer shares with the student.
    """
    match config:
        case PolicyGradientLossConfig():
            return PolicyGradient(config)
        case DivergenceLossConfig():
            loss: Loss = Divergence(config)
        case NllLossConfig():
            loss = NegativeLogLikelihood(config)
        case UldLossConfig():
            assert common is not None, "loss=uld has a teacher with its own tokenizer"
            loss = UniversalLogitDistillation(common, config)
        case FunctionLossConfig(path=path):
            loss = load_function("loss.path", path)(config)
        case _:
            raise AssertionError(f"no loss for {type(config).__name__}")
    return WithReward(loss, reward_policy(config)) if config.reward_weight else loss


def build_reduction(config: Config) -> LossReduction:
    """Which tokens are learned from, and what a step's sum is divided by."""
    return LossReduction(
        reduction=config.loss.reduction,
        prefix_fraction=config.loss.prefix_fraction,
        max_tokens=config.rollout.max_tokens,
    )


def return_discount(config: LossConfig) -> float:
    """The discount of the teacher's return; 0: a token is credited with its own advantage only."""
    if isinstance(config, PolicyGradientLossConfig) and config.teacher_weight:
        return config.discount
    return 0.0
