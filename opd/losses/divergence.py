"""Distances between the teacher's and the student's distribution of the next token."""

from dataclasses import dataclass, field, replace

import torch

from opd.batch import Batch, LossOutput
from opd.config.fields import require_bounds
from opd.config.loss import DivergenceLossConfig, Support
from opd.losses.closed_form import with_gradients
from opd.losses.support import (
    MAX_LOG_RATIO,
    spread,
    student_buckets,
    teacher_buckets,
    within_engine_ids,
)
from opd.losses.token_weights import TokenWeights
from opd.types import DivergenceKind

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Sum over tokens of weight times the divergence between teacher p and student q, in nats.

    forward_kl       sum_v p log(p / q)
    reverse_kl       sum_v q log(q / p)
    jsd              beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q;
                     beta 0 and 1 are forward and reverse KL themselves (GKD, arXiv 2306.13649)
    skew_kl          KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898)
    skew_reverse_kl  KL(q || skew q + (1 - skew) p), the same with p and q exchanged

    v runs over the vocabulary if the batch has ``teacher_logp_NV``. Otherwise it runs over the ids of
    its support (support=intersection: those that are in ``engine_ids_NK`` too) and one more bucket,
    **the tail**: all other ids together. With the tail the sum is a divergence (never negative, at
    most the full one); without it a top-k "KL" is neither.

    ``token_clip`` clamps each token's divergence at that many nats; a clamped one has no gradient.

    Value and slope are closed forms of d = log p - log q, and no graph over [N, V] is kept. Slopes
    are those of the same divergences between measures that need not sum to one (KL + sum q - sum p):
    the softmax's backward pass makes them equal, and so both are exactly zero where p = q. d is
    clamped to 1e4 nats: where one side gives zero probability, terms are exact, or large but finite. Support
    ids must not repeat in a row; teacher ids that the student lacks belong to the tail.
    """

    config: DivergenceLossConfig = field(default_factory=DivergenceLossConfig)

    def __post_init__(self) -> None:
        require_bounds(self.config, "loss.")

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        config = self.config
        with torch.no_grad():
            if config.support == Support.intersection and batch.teacher_logp_NV is None:
                batch = replace(batch, support_ids_NK=within_engine_ids(batch))
            weight_N, sums = TokenWeights(config)(student_logp_NV, batch)
            value_N, slope_NV, tails = self._per_token(student_logp_NV, batch)
            sums |= tails | {f"loss/{config.kind}": value_N.sum()}
            if batch.teacher_logp_N is not None:
                sums["teacher/nll"] = -batch.teacher_logp_N.clamp(min=-MAX_LOG_RATIO).sum()
            slope_weight_N = weight_N
            if config.token_clip is not None:
                beyond_N = value_N > config.token_clip
                sums["loss/kl_clip_share"] = beyond_N.float().sum()
                value_N = value_N.clamp(max=config.token_clip)
                slope_weight_N = weight_N.masked_fill(beyond_N, 0.0)
            total = (weight_N * value_N).sum()
            slope_NV.mul_(slope_weight_N[:, None])
        return LossOutput(total=with_gradients(total, (student_logp_NV, slope_NV)), sums=sums)

    def _per_token(
        self, student_logp_NV: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Each token's divergence [N], its slope [N, V], and the sums of both tails' probability."""
        if batch.teacher_logp_NV is not None:
            return *self._divergence(student_logp_NV, batch.teacher_logp_NV), {}
        ids_NK, teacher_NJ = teacher_buckets(batch, student_logp_NV.shape[-1])
        student_NJ = student_buckets(student_logp_NV, ids_NK)
        value_N, slope_NJ = self._divergence(student_NJ, teacher_NJ)
        slope_NV = spread(slope_NJ, student_NJ[:, -1:], student_logp_NV, ids_NK)
        tails = {
            "loss/teacher_tail": teacher_NJ[:, -1].exp().sum(),
            "loss/student_tail": student_NJ[:, -1].exp().sum(),
        }
        return value_N, slope_NV, tails

    def _divergence(self, s: torch.Tensor, t: torch.Tensor) -> Pair:
        config = self.config
        return value_and_slope(config.kind, s, t, beta=config.beta, skew=config.skew)


def value_and_slope(
    kind: DivergenceKind, s: torch.Tensor, t: torch.Tensor, *, beta: float, skew: float
) -> Pair:
    """Sums [N] over the columns, and their derivative by ``s``; s, t are log q, log p."""
    match kind:
        case DivergenceKind.forward_kl:
            return _forward_kl(s, t)
        case DivergenceKind.reverse_kl:
            return _reverse_kl(s, t)
        case DivergenceKind.jsd if beta == 0.0:
            return _forward_kl(s, t)
        case DivergenceKind.jsd if beta == 1.0:
            return _reverse_kl(s, t)
        case DivergenceKind.jsd:
            return _jsd(s, t, beta)
        case DivergenceKind.skew_kl if skew == 0.0:
            return _forward_kl(s, t)
        case DivergenceKind.skew_kl:
            return _skew_kl(s, t, skew)
        case DivergenceKind.skew_reverse_kl if skew == 0.0:
            return _reverse_kl(s, t)
        case DivergenceKind.skew_reverse_kl:
            return _skew_reverse_kl(s, t, skew)


def excess_mass(kind: DivergenceKind, *, beta: float, skew: float) -> float:
    """c of c (sum q - sum p): what makes each divergence one of measures that need not sum to one.

    With it the value is never negative, 0 only where p = q, and its derivative is the slope of
    ``value_and_slope``.
    """
    match kind:
        case DivergenceKind.forward_kl:
            return 1.0
        case DivergenceKind.reverse_kl:
            return -1.0
        case DivergenceKind.jsd:
            return {0.0: 1.0, 1.0: -1.0}.get(beta, 0.0)
        case DivergenceKind.skew_kl:
            return 1.0 - skew
        case DivergenceKind.skew_reverse_kl:
            return skew - 1.0


def _log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a - b within 1e4 nats; 0 where both are -inf."""
    ratio = (a - b).nan_to_num_(nan=0.0, posinf=MAX_LOG_RATIO, neginf=-MAX_LOG_RATIO)
    return ratio.clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log_mixtures(d: torch.Tensor, share: float) -> Pair:
    """log(m / q) and log(m / p) of m = share p + (1 - share) q, from d = log p - log q.

    log(m / q) = max(d, 0) + log1p(w expm1(-|d|)), w the share of the smaller one; exactly 0 at d = 0.
    """
    common = d.abs().neg_().expm1_()
    common.mul_(torch.where(d > 0.0, d.new_tensor(1.0 - share), d.new_tensor(share))).log1p_()
    return common + d.clamp(min=0.0), common.sub_(d.clamp_(max=0.0))


def _forward_kl(s: torch.Tensor, t: torch.Tensor) -> Pair:
    p = t.exp()
    value_N = _log_ratio(t, s).mul_(p).sum(dim=-1)
    return value_N, p.neg_().add_(s.exp())  # q - p


def _reverse_kl(s: torch.Tensor, t: torch.Tensor) -> Pair:
    terms = _log_ratio(s, t).mul_(s.exp())
    return terms.sum(dim=-1), terms  # q log(q / p)


def _jsd(s: torch.Tensor, t: torch.Tensor, beta: float) -> Pair:
    over_q, over_p = _log_mixtures(_log_ratio(t, s), beta)
    slope = over_q.mul_(s.exp()).mul_(beta - 1.0)  # (1 - beta) q log(q / m)
    value_N = slope.sum(dim=-1) - beta * over_p.mul_(t.exp()).sum(dim=-1)
    return value_N, slope


def _skew_kl(s: torch.Tensor, t: torch.Tensor, skew: float) -> Pair:
    _, over_p = _log_mixtures(_log_ratio(t, s), skew)
    value_N = -(over_p * t.exp()).sum(dim=-1)
    return value_N, over_p.neg_().expm1_().mul_(s.exp()).mul_(skew - 1.0)  # (1 - skew) q (1 - p/m)


def _skew_reverse_kl(s: torch.Tensor, t: torch.Tensor, skew: float) -> Pair:
    over_q, _ = _log_mixtures(_log_ratio(t, s), 1.0 - skew)
    ratio, q = over_q.neg_(), s.exp()  # log(q / m)
    value_N = (ratio * q).sum(dim=-1)
    return value_N, ratio.sub_(ratio.expm1().mul_(skew)).mul_(q)  # q (L - skew (q / m - 1))
