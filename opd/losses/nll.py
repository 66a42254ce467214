"""Plain next-token likelihood, for supervised fine-tuning."""

from dataclasses import dataclass

import torch

from opd.batch import Batch, LossOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class NegativeLogLikelihood:
    """Sum over tokens of -log q(target), in nats. Asks nothing of a teacher."""

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        total = -student_logp_NV.gather(-1, batch.target_N[:, None]).sum()
        return LossOutput(total=total, sums={"loss/nll": total.detach()})
