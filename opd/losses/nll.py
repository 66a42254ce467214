"""Plain next-token likelihood, for supervised fine-tuning."""

from dataclasses import dataclass, field

import torch

from opd.batch import Batch, LossOutput
from opd.losses.token_weights import Factors, at_target


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeLogLikelihood:
    """Sum over tokens of factor times -log q(target), in nats. Asks nothing of a teacher."""

    factors: Factors = field(default_factory=Factors)

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        factor_N, sums = self.factors(student_logp_NV, batch)
        nll_N = -at_target(student_logp_NV, batch)
        sums["loss/nll"] = nll_N.detach().sum()
        return LossOutput(total=(factor_N * nll_N).sum(), sums=sums)
