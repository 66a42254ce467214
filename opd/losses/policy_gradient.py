"""Policy gradients on sampled tokens: the teacher's log-prob as a reward, a verifier's, or both."""

from dataclasses import dataclass, field

import torch

from opd.batch import Batch, LossOutput
from opd.config.fields import require_bounds
from opd.config.loss import PolicyGradientLossConfig
from opd.losses.support import MAX_LOG_RATIO
from opd.losses.token_weights import TokenWeights, at_target
from opd.types import Surrogate

MAX_GAIN = 20.0
"""Nats; log p - log q in k3's exponential is clamped to this, as other libraries do."""


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """Sum over tokens of weight times a surrogate whose gradient is that of an expected reward.

    A = teacher_weight * [log p(y) - log q(y) + ``future_N`` where the batch has it, clamped to
    plus and minus advantage_clip nats] + reward_weight * ``advantage_N``. For tokens sampled from
    the student the expected gradient of the teacher's part is that of the exact reverse KL. Per token,
    with A held fixed and r = q(y) / engine(y), 1 where no engine wrote y:

    clip   -min(r A, clip(r, 1 - clip_ratio_low, 1 + clip_ratio_high) A)     (PPO, arXiv 1707.06347)
    plain  -A log q                                              (times the importance correction)

    ``kl_coef`` adds kl_coef * k3, k3 = p / q - 1 - log(p / q), the reference policy in the teacher's place:
    with teacher_weight 0 and reward_weight 1 this is GRPO (arXiv 2402.03300).

    The value is a surrogate: only its gradient has a meaning. The reverse KL that the teacher's part
    lowers is estimated by k1 = log(q / p), k2 = k1^2 / 2 and k3
    (http://joschu.net/blog/kl-approx.html); ``loss/clip_share`` counts tokens whose gradient PPO's
    clip removed, ``loss/teacher_advantage`` and ``loss/reward_advantage`` are sizes of the two parts
    of A.
    """

    config: PolicyGradientLossConfig = field(default_factory=PolicyGradientLossConfig)

    def __post_init__(self) -> None:
        require_bounds(self.config, "loss.")

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        config = self.config
        weight_N, sums = TokenWeights(config)(student_logp_NV, batch)
        logp_N = at_target(student_logp_NV, batch)
        advantage_N = torch.zeros_like(logp_N)
        cost_N = torch.zeros_like(logp_N)
        if config.teacher_weight or config.kl_coef:
            assert batch.teacher_logp_N is not None, "this needs the teacher's log-probs"
            teacher_N = batch.teacher_logp_N.clamp(min=-MAX_LOG_RATIO)
            gain_N = teacher_N - logp_N.detach()
            sums |= _estimates(gain_N) | {"teacher/nll": -teacher_N.sum()}
            if config.kl_coef:
                cost_N = config.kl_coef * _k3(gain_N, logp_N)
            if config.teacher_weight:
                part_N = self._teacher_part(gain_N, batch, sums)
                sums["loss/teacher_advantage"] = part_N.abs().sum()
                advantage_N += part_N
        if config.reward_weight:
            assert batch.advantage_N is not None, (
                "a reward's advantage is needed on every completion"
            )
            part_N = config.reward_weight * batch.advantage_N
            sums["loss/reward_advantage"] = part_N.abs().sum()
            advantage_N += part_N
        match config.surrogate:
            case Surrogate.plain:
                objective_N = advantage_N * logp_N
            case Surrogate.clip:
                objective_N, clipped_N = self._clipped(logp_N, batch.engine_logp_N, advantage_N)
                sums["loss/clip_share"] = clipped_N.float().sum()
        return LossOutput(total=(weight_N * (cost_N - objective_N)).sum(), sums=sums)

    def _teacher_part(
        self, gain_N: torch.Tensor, batch: Batch, sums: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        advantage_N = gain_N if batch.future_N is None else gain_N + batch.future_N
        if self.config.advantage_clip is not None:
            clamped_N = advantage_N.clamp(-self.config.advantage_clip, self.config.advantage_clip)
            sums["loss/advantage_clip_share"] = (clamped_N != advantage_N).float().sum()
            advantage_N = clamped_N
        return self.config.teacher_weight * advantage_N

    def _clipped(
        self, logp_N: torch.Tensor, engine_logp_N: torch.Tensor, advantage_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """PPO's objective [N], and which tokens [N] have no gradient because of the clip."""
        behaviour_logp_N = torch.where(engine_logp_N.isnan(), logp_N.detach(), engine_logp_N)
        ratio_N = (logp_N - behaviour_logp_N).exp()
        plain_N = ratio_N * advantage_N
        clamped_N = (
            ratio_N.clamp(1.0 - self.config.clip_ratio_low, 1.0 + self.config.clip_ratio_high)
            * advantage_N
        )
        return torch.minimum(plain_N, clamped_N), clamped_N.detach() < plain_N.detach()


def _estimates(gain_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums of three estimates of reverse KL."""
    clamped_N = gain_N.clamp(max=MAX_GAIN)
    return {
        "loss/reverse_kl_k1": -gain_N.sum(),
        "loss/reverse_kl_k2": gain_N.square().sum() / 2,
        "loss/reverse_kl_k3": (clamped_N.expm1() - clamped_N).sum(),
    }


def _k3(gain_N: torch.Tensor, logp_N: torch.Tensor) -> torch.Tensor:
    """k3 with its gradient (1 - p / q) by log q, both of a gain of at most ``MAX_GAIN``."""
    clamped_N = gain_N.clamp(max=MAX_GAIN)
    value_N = clamped_N.expm1() - clamped_N
    return value_N - clamped_N.expm1() * (logp_N - logp_N.detach())
