"""The factor of each token's loss: a weighting of tokens times an importance correction."""

from dataclasses import dataclass

import torch

from opd.batch import Batch
from opd.config.loss import LossConfig
from opd.losses.support import MAX_LOG_RATIO, teacher_buckets
from opd.types import Correction, Weighting

MAX_LOG_CORRECTION = 20.0
"""Nats; the largest log-ratio of an importance correction, as in verl."""


@dataclass(frozen=True, slots=True)
class TokenWeighting:
    """A weight in [0, 1] for each token, by its entropy or by the gap between teacher and student.

    uniform          1
    student_entropy  H(q) / log V
    teacher_entropy  H(p) / log J over the J buckets (ids and tail) that the teacher scored, or / log V
    gap              min(|log p(y) - log q(y)|, gap_clip) / gap_clip, y the sampled token

    Entropies in nats; a position with one bucket has entropy 0.
    """

    config: LossConfig

    def weights(self, student_logp_NV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Weights [N]."""
        match self.config.weighting:
            case Weighting.uniform:
                return student_logp_NV.new_ones(student_logp_NV.shape[0])
            case Weighting.student_entropy:
                return _entropy_share(student_logp_NV, student_logp_NV.shape[-1])
            case Weighting.teacher_entropy if batch.teacher_logp_NV is not None:
                return _entropy_share(batch.teacher_logp_NV, batch.teacher_logp_NV.shape[-1])
            case Weighting.teacher_entropy:
                ids_NK, logp_NJ = teacher_buckets(batch, student_logp_NV.shape[-1])
                buckets_N = (ids_NK >= 0).sum(dim=-1) + 1
                return _entropy_share(logp_NJ, buckets_N.clamp(max=student_logp_NV.shape[-1]))
            case Weighting.gap:
                assert batch.teacher_logp_N is not None, "a gap needs the teacher's log-probs"
                gap_N = (batch.teacher_logp_N - at_target(student_logp_NV, batch)).abs()
                return gap_N.clamp(max=self.config.gap_clip) / self.config.gap_clip


@dataclass(frozen=True, slots=True)
class ImportanceCorrection:
    """An importance ratio for each token that an engine wrote; 1 for the others.

    none                r = 1
    truncate            min(r, correction_cap), r = learner / engine probability of the token (TIS)
    mask                r if correction_min <= r <= correction_max, else 0 (IcePop)
    sequence_truncate   the same with r = the product of the ratios of the completion's tokens, the
    sequence_mask       ratio of its probabilities (TRL's modes of these names)
    geometric_truncate  the same with r = the geometric mean of the ratios of the completion's tokens
    geometric_mask      (GSPO, arXiv 2507.18071)

    A ratio is at most e^20, so that a completion of thousands of tokens stays finite without a cap.
    """

    config: LossConfig

    def ratios(
        self, student_logp_NV: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ratios [N], and which of them [N] were truncated or masked."""
        config = self.config
        match config.correction:
            case Correction.none:
                ratio_N = torch.ones_like(batch.engine_logp_N)
                return ratio_N, torch.zeros_like(ratio_N, dtype=torch.bool)
            case Correction.truncate | Correction.mask:
                gap_N = at_target(student_logp_NV, batch) - batch.engine_logp_N
            case Correction.sequence_truncate | Correction.sequence_mask:
                assert batch.sequence_gap_N is not None, "this needs Student(sequence_gaps=True)"
                gap_N = batch.sequence_gap_N
            case Correction.geometric_truncate | Correction.geometric_mask:
                assert batch.sequence_mean_gap_N is not None, (
                    "this needs Student(sequence_gaps=True)"
                )
                gap_N = batch.sequence_mean_gap_N
        ratio_N = gap_N.nan_to_num(nan=0.0).clamp(max=MAX_LOG_CORRECTION).exp()  # NaN: no engine
        match config.correction:
            case Correction.truncate | Correction.sequence_truncate | Correction.geometric_truncate:
                return ratio_N.clamp(max=config.correction_cap), ratio_N > config.correction_cap
            case Correction.mask | Correction.sequence_mask | Correction.geometric_mask:
                low, high = config.correction_min, config.correction_max
                outside_N = (ratio_N < low) | (ratio_N > high)
                return ratio_N.masked_fill(outside_N, 0.0), outside_N


@dataclass(frozen=True, slots=True)
class TokenWeights:
    """``batch.weight_N`` (None is 1) times token weighting and importance correction, no gradient."""

    config: LossConfig

    @torch.no_grad()
    def __call__(
        self, student_logp_NV: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Factors [N] and sums: ``loss/weighting``, ``loss/correction``, ``loss/correction_share``.

        ``loss/correction_share`` counts the tokens whose ratio was truncated or masked.
        """
        weighting_N = TokenWeighting(self.config).weights(student_logp_NV, batch)
        ratio_N, changed_N = ImportanceCorrection(self.config).ratios(student_logp_NV, batch)
        sums = {}
        if self.config.weighting is not Weighting.uniform:
            sums["loss/weighting"] = weighting_N.sum()
        if self.config.correction is not Correction.none:
            sums["loss/correction"] = ratio_N.sum()
            sums["loss/correction_share"] = changed_N.float().sum()
        weight_N = weighting_N * ratio_N
        return weight_N if batch.weight_N is None else weight_N * batch.weight_N, sums


def at_target(logp_NV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probs [N] of the targets; -inf becomes -1e4, with no gradient."""
    return logp_NV.gather(-1, batch.target_N[:, None]).squeeze(-1).clamp(min=-MAX_LOG_RATIO)


def _entropy_share(logp_NJ: torch.Tensor, buckets: int | torch.Tensor) -> torch.Tensor:
    """-sum p log p / log buckets, [N]."""
    terms_NJ = logp_NJ.exp().mul_(logp_NJ.clamp(min=-MAX_LOG_RATIO))
    largest_N = torch.as_tensor(buckets, device=logp_NJ.device).clamp(min=2).log()
    return (-terms_NJ.sum(dim=-1) / largest_N.to(logp_NJ.dtype)).clamp(0.0, 1.0)
