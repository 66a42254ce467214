"""Any loss, and a policy gradient on a reward beside it."""

from dataclasses import dataclass

import torch

from opd.batch import Batch, LossOutput
from opd.config.loss import LossConfig, PolicyGradientLossConfig
from opd.interfaces import Loss
from opd.losses.policy_gradient import PolicyGradient
from opd.types import Correction, Surrogate


@dataclass(frozen=True, slots=True)
class WithReward:
    """The sum of ``loss`` and of a policy gradient on ``batch.advantage_N``."""

    loss: Loss
    policy: PolicyGradient

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        first, second = self.loss(student_logp_NV, batch), self.policy(student_logp_NV, batch)
        return LossOutput(
            total=first.total + second.total,
            sums=second.sums | first.sums,
            maxima=second.maxima | first.maxima,
            counts=second.counts | first.counts,
        )


def reward_policy(config: LossConfig) -> PolicyGradient:
    """The reward's part of any loss; ``config.weighting`` does not apply to it."""
    corrected = config.correction != Correction.none
    return PolicyGradient(
        PolicyGradientLossConfig(
            surrogate=Surrogate.plain if corrected else Surrogate.clip,
            teacher_weight=0.0,
            reward_weight=config.reward_weight,
            clip_ratio_low=config.clip_ratio_low,
            clip_ratio_high=config.clip_ratio_high,
            correction=config.correction,
            correction_cap=config.correction_cap,
            correction_min=config.correction_min,
            correction_max=config.correction_max,
        )
    )
