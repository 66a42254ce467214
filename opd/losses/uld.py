"""The distance between two distributions over different vocabularies, at spans of the same text."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from opd.batch import Batch, LossOutput
from opd.config.fields import require_bounds
from opd.config.uld import UldLossConfig, Unmatched
from opd.losses.closed_form import with_gradients
from opd.losses.divergence import excess_mass, value_and_slope
from opd.losses.support import MAX_LOG_RATIO
from opd.losses.token_weights import TokenWeights, at_target
from opd.spans import CommonVocabulary
from opd.types import IntArray

Distance = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

LEAST_TAIL = 2.0**-24
"""float32 cannot distinguish 1 less a smaller probability from 1."""


@dataclass(frozen=True, slots=True)
class UniversalLogitDistillation:
    """Sum over spans of weight times a distance between teacher and student.

    A span is the least text that whole tokens of both sides cover. In it both sides are compared at their
    last token, by the probability of the tokens before it times the distribution of the last one
    (chain rule): the measures q over the student's and p over the teacher's vocabulary. With
    unmatched=sorted,

        matched_weight D(p, q) over texts that both sides have
        + unmatched_weight sum_i |p_(i) - q_(i)| over the others, each side sorted by size
          (ULD, arXiv 2402.12030; the shorter side is continued with zeros).

    Texts that both sides have are, where the span is one token on both sides, the common vocabulary
    (equal text, and the end tokens); in longer spans, whose last tokens stand behind different text, the
    span itself. D is ``kind``, extended to measures that do not sum to one, so that it is never
    negative and 0 only where p = q: KL becomes sum p log(p / q) - p + q.

    With unmatched=prefix there are buckets instead of pairs, and both sides sum to one: in a span of one
    token on both sides each id counts to the longest common token that its text begins with, ids
    without one to a tail; a longer span has two buckets, the span and everything else. The loss is
    matched_weight D over the buckets. A token ``+`` of the student and a token ``+0=`` of the teacher
    are then the same beginning, where unmatched=sorted counts them as different answers.

    Gradients reach every token of a span. Tokens outside a compared span add nothing. A span has the
    weight of its last token.

    Metrics: ``loss/uld`` (both parts, weighted), ``loss/uld_matched`` (D), ``loss/uld_unmatched`` (the
    sorted sum), ``loss/uld_span_share`` (spans per token), ``loss/uld_compared_share`` (tokens in them).
    """

    common: CommonVocabulary
    config: UldLossConfig = field(default_factory=UldLossConfig)

    def __post_init__(self) -> None:
        require_bounds(self.config, "loss.")

    @torch.no_grad()
    def __call__(self, student_logp_NV: torch.Tensor, batch: Batch) -> LossOutput:
        span_N, target_N = batch.span_N, batch.span_target_N
        assert span_N is not None, "this loss needs teacher.tokenizer=own"
        assert target_N is not None, "spans have targets"
        assert batch.span_logp_N is not None, "spans have log-probs"
        assert batch.span_single_N is not None, "spans know whether they are one token"
        assert batch.teacher_logp_NV is not None, "this loss needs the teacher's distributions"
        weight_N, sums = TokenWeights(self.config)(student_logp_NV, batch)
        own_N = at_target(student_logp_NV, batch)
        group_N = torch.unique_consecutive(span_N, return_inverse=True)[1]
        group_N = group_N.reshape(span_N.shape)
        sum_G = own_N.new_zeros(len(span_N)).index_add(0, group_N, own_N)
        grad_NV = torch.zeros_like(student_logp_NV)
        before_N = own_N.new_zeros(len(span_N))  # the derivative by the tokens before the last
        matched, unmatched = own_N.new_zeros(()), own_N.new_zeros(())
        is_end_N = (target_N >= 0) & (span_N >= 0)
        for single in (True, False):
            end_E = (is_end_N & (batch.span_single_N == single)).nonzero()[:, 0]
            before_E1 = (sum_G[group_N[end_E]] - own_N[end_E])[:, None]
            s_EV = student_logp_NV[end_E] + (0.0 if single else before_E1)
            t_EW = batch.teacher_logp_NV[end_E] + batch.span_logp_N[end_E][:, None]
            distance = self._sorted if self.config.unmatched == Unmatched.sorted else self._prefix
            matched_E, unmatched_E, slope_EV = distance(
                s_EV, t_EW, batch.target_N[end_E], target_N[end_E], single=single
            )
            matched += (weight_N[end_E] * matched_E).sum()
            unmatched += (weight_N[end_E] * unmatched_E).sum()
            slope_EV *= weight_N[end_E][:, None]
            grad_NV[end_E] = slope_EV
            before_N[end_E] = slope_EV.sum(dim=-1)
        sum_G = torch.zeros_like(sum_G).index_add(0, group_N, before_N)
        earlier_N = (sum_G[group_N] * (~is_end_N & (span_N >= 0)))[:, None]
        grad_NV.scatter_add_(1, batch.target_N[:, None], earlier_N)
        config = self.config
        total = config.matched_weight * matched + config.unmatched_weight * unmatched
        sums |= {
            "loss/uld": total.clone(),
            "loss/uld_matched": matched,
            "loss/uld_unmatched": unmatched,
            "loss/uld_span_share": is_end_N.float().sum(),
            "loss/uld_compared_share": (span_N >= 0).float().sum(),
        }
        if batch.teacher_logp_N is not None:
            sums["teacher/nll"] = -batch.teacher_logp_N.clamp(min=-MAX_LOG_RATIO).sum()
        with torch.enable_grad():
            total = with_gradients(total, (student_logp_NV, grad_NV))
        return LossOutput(total=total, sums=sums)

    def _ids(self, like: torch.Tensor, ids: IntArray) -> torch.Tensor:
        return torch.from_numpy(ids).to(like.device).long()

    def _sorted(
        self,
        s_EV: torch.Tensor,
        t_EW: torch.Tensor,
        own_E: torch.Tensor,
        teacher_E: torch.Tensor,
        *,
        single: bool,
    ) -> Distance:
        """D [E], the sorted sum [E], and the slope [E, V] of their weighted sum by log q."""
        config, common = self.config, self.common
        own_EM, teacher_EM = own_E[:, None], teacher_E[:, None]
        if single:
            own_EM = self._ids(own_E, common.student_ids).expand(len(own_E), -1)
            teacher_EM = self._ids(own_E, common.teacher_ids).expand(len(own_E), -1)
        shape = {"beta": config.beta, "skew": config.skew}
        s_EM, t_EM = s_EV.gather(1, own_EM), t_EW.gather(1, teacher_EM)
        matched_E, slope_EM = value_and_slope(config.kind, s_EM, t_EM, **shape)
        excess = (s_EM.exp() - t_EM.exp()).sum(dim=-1)
        matched_E = matched_E + excess_mass(config.kind, **shape) * excess
        q_EV = s_EV.exp().scatter(1, own_EM, 0.0)
        p_EW = t_EW.exp().scatter(1, teacher_EM, 0.0)
        unmatched_E, slope_EV = sorted_distance(q_EV, p_EW)
        slope_EV.mul_(q_EV).mul_(config.unmatched_weight)
        slope_EV.scatter_(1, own_EM, config.matched_weight * slope_EM)
        return matched_E, unmatched_E, slope_EV

    def _prefix(
        self,
        s_EV: torch.Tensor,
        t_EW: torch.Tensor,
        own_E: torch.Tensor,
        teacher_E: torch.Tensor,
        *,
        single: bool,
    ) -> Distance:
        """D [E] over buckets, 0 [E], and the slope [E, V] of the weighted D by log q."""
        config, common = self.config, self.common
        shape = {"beta": config.beta, "skew": config.skew}
        if single:
            buckets = len(common.student_ids) + 1
            own_V = self._ids(own_E, common.student_buckets[: s_EV.shape[1]])
            s_EJ = bucket_logps(s_EV, own_V, buckets)
            teacher_W = self._ids(own_E, common.teacher_buckets[: t_EW.shape[1]])
            t_EJ = bucket_logps(t_EW, teacher_W, buckets)
            value_E, slope_EJ = value_and_slope(config.kind, s_EJ, t_EJ, **shape)
            slope_EV = (s_EV - s_EJ[:, own_V]).exp_().mul_(slope_EJ[:, own_V])
        else:
            s_E1 = s_EV.gather(1, own_E[:, None]).clamp(max=-LEAST_TAIL)
            t_E1 = t_EW.gather(1, teacher_E[:, None]).clamp(max=-LEAST_TAIL)
            s_EJ = torch.cat([s_E1, s_E1.expm1().neg().log()], dim=1)
            t_EJ = torch.cat([t_E1, t_E1.expm1().neg().log()], dim=1)
            value_E, slope_EJ = value_and_slope(config.kind, s_EJ, t_EJ, **shape)
            odds_E = (s_EJ[:, 0] - s_EJ[:, 1]).exp()
            slope_E = slope_EJ[:, 0] - slope_EJ[:, 1] * odds_E
            slope_EV = torch.zeros_like(s_EV).scatter_(1, own_E[:, None], slope_E[:, None])
        return value_E, torch.zeros_like(value_E), slope_EV.mul_(config.matched_weight)


def bucket_logps(logp_EV: torch.Tensor, bucket_V: torch.Tensor, buckets: int) -> torch.Tensor:
    """Log-probs [E, buckets] of the ids of each bucket together; -inf for an empty one."""
    index_EV = bucket_V.expand_as(logp_EV)
    most_EJ = logp_EV.new_full((len(logp_EV), buckets), -torch.inf)
    most_EJ.scatter_reduce_(1, index_EV, logp_EV, "amax")
    sum_EJ = torch.zeros_like(most_EJ)
    sum_EJ.scatter_add_(1, index_EV, (logp_EV - most_EJ[:, bucket_V]).exp_())
    return sum_EJ.log_().add_(most_EJ)


def sorted_distance(q_EV: torch.Tensor, p_EW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i |q_(i) - p_(i)| [E] of probabilities sorted by size, and its derivative by q [E, V]."""
    sorted_EV, order_EV = q_EV.sort(dim=-1, descending=True)
    sorted_EW = p_EW.sort(dim=-1, descending=True).values
    width = max(sorted_EV.shape[-1], sorted_EW.shape[-1])
    gap_EX = pad(sorted_EV, (0, width - sorted_EV.shape[-1]))
    gap_EX = gap_EX - pad(sorted_EW, (0, width - sorted_EW.shape[-1]))
    sign_EV = gap_EX[:, : sorted_EV.shape[-1]].sign()
    return gap_EX.abs().sum(dim=-1), torch.zeros_like(q_EV).scatter_(1, order_EV, sign_EV)
