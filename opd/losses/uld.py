"""The distance between two distributions over different vocabularies, at spans of the same text."""

from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from opd.batch import Batch, LossOutput
from opd.config.fields import require_bounds
from opd.config.loss import UldLossConfig
from opd.losses.closed_form import with_gradients
from opd.losses.divergence import excess_mass, value_and_slope
from opd.losses.support import MAX_LOG_RATIO
from opd.losses.token_weights import TokenWeights, at_target
from opd.spans import CommonVocabulary


@dataclass(frozen=True, slots=True)
class UniversalLogitDistillation:
    """Sum over spans of weight times the distance between the teacher and the student, hybrid of GOLD.

    A span is the least text that whole tokens of both sides cover. In it both sides are compared at their
    last token, by the probability of the tokens before it times the distribution of the last one
    (chain rule): the measures q over the student's and p over the teacher's vocabulary. Then

        matched_weight D(p, q) over texts that both sides have
        + unmatched_weight sum_i |p_(i) - q_(i)| over the others, each side sorted by size
          (ULD, arXiv 2402.12030; the shorter side is continued with zeros).

    Texts that both sides have are, where the span is one token on both sides, the common vocabulary
    (equal text, and the end tokens); in longer spans, whose last tokens stand behind different text, the
    span itself. D is ``kind``, extended to measures that do not sum to one, so that it is never
    negative and 0 only where p = q: KL becomes sum p log(p / q) - p + q. Gradients reach every token
    of a span. Tokens outside a compared span add nothing. A span has the weight of its last token.

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
            pairs = self._pairs(batch.target_N[end_E], target_N[end_E], single=single)
            matched_E, unmatched_E, slope_EV = self._distance(s_EV, t_EW, *pairs)
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

    def _pairs(
        self, own_E: torch.Tensor, teacher_E: torch.Tensor, *, single: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of equal text, [E, M] of each side: the common vocabulary, or the span's last token."""
        if not single:
            return own_E[:, None], teacher_E[:, None]
        device, rows = own_E.device, len(own_E)
        own = torch.from_numpy(self.common.student_ids).to(device).long()
        teacher = torch.from_numpy(self.common.teacher_ids).to(device).long()
        return own.expand(rows, -1), teacher.expand(rows, -1)

    def _distance(
        self, s_EV: torch.Tensor, t_EW: torch.Tensor, own_EM: torch.Tensor, teacher_EM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """D [E], the sorted sum [E], and the slope [E, V] of their weighted sum by log q."""
        config = self.config
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


def sorted_distance(q_EV: torch.Tensor, p_EW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_i |q_(i) - p_(i)| [E] of probabilities sorted by size, and its derivative by q [E, V]."""
    sorted_EV, order_EV = q_EV.sort(dim=-1, descending=True)
    sorted_EW = p_EW.sort(dim=-1, descending=True).values
    width = max(sorted_EV.shape[-1], sorted_EW.shape[-1])
    gap_EX = pad(sorted_EV, (0, width - sorted_EV.shape[-1]))
    gap_EX = gap_EX - pad(sorted_EW, (0, width - sorted_EW.shape[-1]))
    sign_EV = gap_EX[:, : sorted_EV.shape[-1]].sign()
    return gap_EX.abs().sum(dim=-1), torch.zeros_like(q_EV).scatter_(1, order_EV, sign_EV)
