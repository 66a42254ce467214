"""Next-token negative log-likelihood, for supervised fine-tuning."""

from dataclasses import dataclass, field

import torch

from opd.batch import Batch, LossOutput
from opd.config.fields import require_bounds
from opd.config.loss import LossConfig, NllLossConfig
from opd.losses.token_weights import TokenWeights, at_target


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """Sum over tokens of weight times -log q(target), in nats. Needs no teacher."""

    config: LossConfig = field(default_factory=NllLossConfig)

    def __post_init__(self) -> None:
        require_bounds(self.config, "loss.")

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        weight_N, sums = TokenWeights(self.config)(student_logp_NV, batch)
        nll_N = -at_target(student_logp_NV, batch)
        sums["loss/nll"] = nll_N.detach().sum()
        return LossOutput(total=(weight_N * nll_N).sum(), sums=sums)
