"""Distances between the teacher's and the student's distribution of the next token."""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from opd.batch import Batch, LossOutput
from opd.losses.closed_form import with_gradients
from opd.types import DivergenceKind

MAX_LOG_RATIO = 1e4  # nats; exp(-1e4) is 0, so 0 * log 0 is 0 and no infinity meets a zero
UNSEEN_TAIL = math.log(2.0**-24)  # what 1 - sum(p) cannot tell from zero in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Sum over tokens of the divergence between teacher p and student q, in nats.

    forward_kl       sum_v p log(p / q)
    reverse_kl       sum_v q log(q / p)
    jsd              beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q;
                     beta 0 and 1 are forward and reverse KL themselves (GKD, arXiv 2306.13649)
    skew_kl          KL(p || skew p + (1 - skew) q) (DistiLLM, arXiv 2402.03898)
    skew_reverse_kl  KL(q || skew q + (1 - skew) p), its mirror

    v runs over the vocabulary when the batch carries ``teacher_logp_NV``. Otherwise it runs over
    the ids of its support and one more bucket, **the tail**: all other ids together. With it the
    sum is a divergence (never negative, at most the full one); without it a top-k "KL" is neither.
    The student's tail is a logsumexp over the other ids, not log(1 - sum), and pulls on all of
    them.

    A log ratio beyond 1e4 nats is cut there: where the teacher gives zero probability, forward
    terms are exact and reverse terms are huge but finite. Float32's rounding of a teacher's 1 - sum
    is undone: a tail of -inf beside an incomplete support is read as 2^-24, and any tail beside the
    whole vocabulary as none. Support ids must not repeat in a row; teacher ids that the student
    lacks count to the tail.

    Value and gradient are closed forms; no graph over [N, V] is kept.
    """

    kind: DivergenceKind = DivergenceKind.reverse_kl
    beta: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"loss beta is {self.beta}; it must lie in [0, 1]")
        if not 0.0 <= self.skew < 1.0:
            raise ValueError(f"loss skew is {self.skew}; it must lie in [0, 1)")

    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        sums: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            if batch.teacher_logp_NV is not None:
                value, slope_NV = self._value_and_slope(student_logp_NV, batch.teacher_logp_NV)
            else:
                ids_NK, teacher_NJ = _teacher_buckets(batch, student_logp_NV.shape[-1])
                student_NJ = _student_buckets(student_logp_NV, ids_NK)
                value, slope_NJ = self._value_and_slope(student_NJ, teacher_NJ)
                slope_NV = _spread(slope_NJ, student_NJ[:, -1:], student_logp_NV, ids_NK)
                sums["loss/teacher_tail"] = teacher_NJ[:, -1].exp().sum()
                sums["loss/student_tail"] = student_NJ[:, -1].exp().sum()
            sums[f"loss/{self.kind}"] = value
            if batch.teacher_logp_N is not None:
                sums["teacher/nll"] = -batch.teacher_logp_N.sum()
        return LossOutput(total=with_gradients(value, (student_logp_NV, slope_NV)), sums=sums)

    def _value_and_slope(
        self, s: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over all rows and columns, and its derivative by ``s``; s, t are log q, log p."""
        match self.kind:
            case DivergenceKind.forward_kl:
                return _forward_kl(s, t)
            case DivergenceKind.reverse_kl:
                return _reverse_kl(s, t)
            case DivergenceKind.jsd if self.beta == 0.0:
                return _forward_kl(s, t)
            case DivergenceKind.jsd if self.beta == 1.0:
                return _reverse_kl(s, t)
            case DivergenceKind.jsd:
                return _jsd(s, t, self.beta)
            case DivergenceKind.skew_kl if self.skew == 0.0:
                return _forward_kl(s, t)
            case DivergenceKind.skew_kl:
                return _skew_kl(s, t, self.skew)
            case DivergenceKind.skew_reverse_kl if self.skew == 0.0:
                return _reverse_kl(s, t)
            case DivergenceKind.skew_reverse_kl:
                return _skew_reverse_kl(s, t, self.skew)


def _log_ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _log_mixture(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight exp(a) + (1 - weight) exp(b))."""
    a = a + math.log(weight)
    return torch.logaddexp(a, b + math.log1p(-weight), out=a)


def _forward_kl(s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p = t.exp()
    return _log_ratio(t, s).mul_(p).sum(), p.neg_()


def _reverse_kl(s: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q = s.exp()
    terms = _log_ratio(s, t).mul_(q)
    return terms.sum(), terms.add_(q)


def _jsd(s: torch.Tensor, t: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    m = _log_mixture(t, s, beta)
    terms = _log_ratio(s, m).mul_(s.exp()).mul_(1.0 - beta)
    value = terms.sum() + beta * _log_ratio(t, m).mul_(t.exp()).sum()
    return value, terms  # the other parts of the derivative add up to (1 - beta)(1 - m / m) = 0


def _skew_kl(s: torch.Tensor, t: torch.Tensor, skew: float) -> tuple[torch.Tensor, torch.Tensor]:
    m = _log_mixture(t, s, skew)
    value = _log_ratio(t, m).mul_(t.exp()).sum()
    return value, (t + s).sub_(m).exp_().mul_(skew - 1.0)


def _skew_reverse_kl(
    s: torch.Tensor, t: torch.Tensor, skew: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q = s.exp()
    ratio = _log_ratio(s, _log_mixture(s, t, skew))
    terms = ratio * q
    value = terms.sum()
    share = ratio.exp_().mul_(-skew).add_(1.0)  # 1 - skew q / m
    return value, terms.add_(share.mul_(q))


def _teacher_buckets(batch: Batch, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [N, K], -1 where unused, and log-probs [N, K + 1], the tail last."""
    ids_NK, logp_NK, tail_N = batch.support_ids_NK, batch.support_logp_NK, batch.support_tail_N
    assert ids_NK is not None, "a divergence needs the teacher's full distribution or a support"
    assert logp_NK is not None, "a support comes with its log-probs"
    assert tail_N is not None, "a support comes with its tail"
    used_NK = (ids_NK >= 0) & (ids_NK < vocab_size)
    foreign_NK = logp_NK.masked_fill(ids_NK < vocab_size, -torch.inf)
    tail_N = torch.cat([tail_N[:, None], foreign_NK], dim=-1).logsumexp(dim=-1)
    whole_N = used_NK.sum(dim=-1) == vocab_size
    tail_N = tail_N.masked_fill(tail_N.isneginf() & ~whole_N, UNSEEN_TAIL)
    tail_N = tail_N.masked_fill(whole_N, -torch.inf)
    logp_NK = logp_NK.masked_fill(~used_NK, -torch.inf)
    teacher_NJ = torch.cat([logp_NK, tail_N[:, None]], dim=-1).clamp_(min=-MAX_LOG_RATIO)
    return ids_NK.masked_fill(~used_NK, -1), teacher_NJ


def _places(ids_NK: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Columns of a [N, V + 1] tensor; unused places point at the last, which is nobody's."""
    return ids_NK.masked_fill(ids_NK < 0, vocab_size)


def _student_buckets(student_logp_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Log-probs [N, K + 1] of the support ids and of all others together."""
    places_NK = _places(ids_NK, student_logp_NV.shape[-1])
    padded = pad(student_logp_NV, (0, 1), value=-torch.inf)
    support_NK = padded.gather(-1, places_NK)
    tail_N1 = padded.scatter_(-1, places_NK, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([support_NK, tail_N1], dim=-1).clamp_(min=-MAX_LOG_RATIO)


def _spread(
    slope_NJ: torch.Tensor,
    tail_N1: torch.Tensor,
    student_logp_NV: torch.Tensor,
    ids_NK: torch.Tensor,
) -> torch.Tensor:
    """The slope of each bucket handed to its ids: the tail's in proportion to probability."""
    padded = pad(student_logp_NV, (0, 1)).sub_(tail_N1).exp_().mul_(slope_NJ[:, -1:])
    places_NK = _places(ids_NK, student_logp_NV.shape[-1])
    return padded.scatter_(-1, places_NK, slope_NJ[:, :-1])[:, :-1]
