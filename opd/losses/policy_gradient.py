"""Reverse KL from one sampled token each: the teacher's log-prob as a reward."""

from dataclasses import dataclass

import torch

from opd.batch import Batch, LossOutput
from opd.types import Importance


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyGradient:
    """Policy gradient whose advantage is the teacher's log-prob less the student's.

    A = stop_grad(log p(y) - log q(y)) + ``future_N`` when the batch has it, then cut to
    [-advantage_clip, advantage_clip]; r = q(y) / engine(y). Written by the student itself (r = 1)
    the expected gradient is that of the exact reverse KL. Per token, stop-gradient in brackets:

    none        -[A] log q
    clip        -min(r [A], clip(r, 1 - clip_low, 1 + clip_high) [A])     (PPO, behaviour = engine)
    truncate    -[min(r, cap) A] log q                                    (truncated importance)
    mask        -[r A 1(band_low <= r <= band_high)] log q

    The value is a surrogate: only its gradient means something. What it stands for is measured by
    k1 = log(q / p), k2 = k1^2 / 2, k3 = p / q - 1 + k1, three estimators of reverse KL, and
    ``loss/<importance>_share`` counts the tokens whose weight was touched.
    """

    importance: Importance = Importance.clip
    advantage_clip: float | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    cap: float = 2.0
    band_low: float = 0.5
    band_high: float = 2.0

    def __post_init__(self) -> None:
        if self.advantage_clip is not None and self.advantage_clip <= 0.0:
            raise ValueError(f"loss advantage_clip is {self.advantage_clip}; it must be positive")
        if not (0.0 <= self.clip_low <= 1.0 and self.clip_high >= 0.0):
            raise ValueError(
                f"loss clip range is {self.clip_low}, {self.clip_high}; "
                "clip_low must lie in [0, 1] and clip_high must not be negative"
            )
        if self.cap <= 0.0:
            raise ValueError(f"loss cap is {self.cap}; it must be positive")
        if not 0.0 <= self.band_low <= 1.0 <= self.band_high:
            raise ValueError(
                f"loss band is {self.band_low}..{self.band_high}; it must hold 1, the ratio of "
                "tokens written by the learner's own weights"
            )

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        assert batch.teacher_logp_N is not None, "a policy gradient needs the teacher's log-probs"
        logp_N = student_logp_NV.gather(-1, batch.target_N[:, None]).squeeze(-1)
        gain_N = batch.teacher_logp_N - logp_N.detach()
        sums = {
            "loss/reverse_kl_k1": -gain_N.sum(),
            "loss/reverse_kl_k2": gain_N.square().sum() / 2,
            "loss/reverse_kl_k3": (gain_N.expm1() - gain_N).sum(),
            "teacher/nll": -batch.teacher_logp_N.sum(),
        }
        advantage_N = gain_N if batch.future_N is None else gain_N + batch.future_N
        if self.advantage_clip is not None:
            cut_N = advantage_N.clamp(-self.advantage_clip, self.advantage_clip)
            sums["loss/advantage_clip_share"] = (cut_N != advantage_N).float().sum()
            advantage_N = cut_N
        surrogate_N, touched_N = self._surrogate(logp_N, batch.engine_logp_N, advantage_N)
        if self.importance is not Importance.none:
            sums[f"loss/{self.importance}_share"] = touched_N.float().sum()
        return LossOutput(total=-surrogate_N.sum(), sums=sums)

    def _surrogate(
        self, logp_N: torch.Tensor, engine_logp_N: torch.Tensor, advantage_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What to raise, per token, and which tokens' weight was touched."""
        ratio_N = (logp_N - engine_logp_N).exp()
        weight_N = ratio_N.detach()
        match self.importance:
            case Importance.none:
                return advantage_N * logp_N, torch.zeros_like(weight_N, dtype=torch.bool)
            case Importance.clip:
                plain_N = ratio_N * advantage_N
                cut_N = ratio_N.clamp(1.0 - self.clip_low, 1.0 + self.clip_high) * advantage_N
                return torch.minimum(plain_N, cut_N), cut_N.detach() < plain_N.detach()
            case Importance.truncate:
                return weight_N.clamp(max=self.cap) * advantage_N * logp_N, weight_N > self.cap
            case Importance.mask:
                inside_N = (weight_N >= self.band_low) & (weight_N <= self.band_high)
                return torch.where(inside_N, weight_N * advantage_N, 0.0) * logp_N, ~inside_N
