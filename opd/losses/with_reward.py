"""Any loss, and a reward beside it."""

from dataclasses import dataclass

import torch

from opd.batch import Batch, LossOutput
from opd.interfaces import Loss
from opd.losses.policy_gradient import PolicyGradient


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewarded:
    """The sum of ``loss`` and of a policy gradient on ``batch.advantage_N``."""

    loss: Loss
    policy: PolicyGradient

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        taught, rewarded = self.loss(student_logp_NV, batch), self.policy(student_logp_NV, batch)
        return LossOutput(
            total=taught.total + rewarded.total,
            sums=rewarded.sums | taught.sums,
            maxima=rewarded.maxima | taught.maxima,
            counts=rewarded.counts | taught.counts,
        )
