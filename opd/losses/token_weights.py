"""What a token's loss is multiplied by: how much it matters, and who wrote it."""

from dataclasses import dataclass, field

import torch

from opd.batch import Batch
from opd.losses.support import MAX_LOG_RATIO, teacher_buckets
from opd.types import Correction, Weighting


@dataclass(frozen=True, slots=True, kw_only=True)
class Weigher:
    """A factor in [0, 1] for each token, by how much there is to learn at it.

    uniform          1
    student_entropy  H(q) / log V
    teacher_entropy  H(p) / log J, over the J buckets (ids and tail) that the teacher told, or log V
    gap              min(|log p(y) - log q(y)|, gap_clip) / gap_clip, y the sampled token

    Entropies in nats; a place with one bucket has entropy 0.
    """

    weighting: Weighting = Weighting.uniform
    gap_clip: float = 5.0

    def __post_init__(self) -> None:
        if not self.gap_clip > 0.0:
            raise ValueError(f"loss gap_clip is {self.gap_clip}; it must be positive")

    def factor(self, student_logp_NV: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[N]."""
        match self.weighting:
            case Weighting.uniform:
                return student_logp_NV.new_ones(student_logp_NV.shape[0])
            case Weighting.student_entropy:
                return _entropy_share(student_logp_NV, student_logp_NV.shape[-1])
            case Weighting.teacher_entropy if batch.teacher_logp_NV is not None:
                return _entropy_share(batch.teacher_logp_NV, batch.teacher_logp_NV.shape[-1])
            case Weighting.teacher_entropy:
                ids_NK, logp_NJ = teacher_buckets(batch, student_logp_NV.shape[-1])
                told_N = (ids_NK >= 0).sum(dim=-1) + 1
                return _entropy_share(logp_NJ, told_N.clamp(max=student_logp_NV.shape[-1]))
            case Weighting.gap:
                assert batch.teacher_logp_N is not None, "a gap needs the teacher's log-probs"
                gap_N = (batch.teacher_logp_N - at_target(student_logp_NV, batch)).abs()
                return gap_N.clamp(max=self.gap_clip) / self.gap_clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Corrector:
    """An importance weight for each token that an engine wrote; 1 for the others.

    none               1
    truncate           min(r, cap), r = learner / engine probability of the token (TIS)
    mask               r if band_low <= r <= band_high, else 0 (IcePop)
    sequence_truncate  the same with r = exp(mean over the completion of the log-prob gap), the
    sequence_mask      geometric mean of its tokens' ratios (GSPO, arXiv 2507.18071)
    """

    correction: Correction = Correction.none
    cap: float = 2.0
    band_low: float = 0.5
    band_high: float = 2.0

    def __post_init__(self) -> None:
        if self.cap <= 0.0:
            raise ValueError(f"loss cap is {self.cap}; it must be positive")
        if not 0.0 <= self.band_low <= 1.0 <= self.band_high:
            raise ValueError(
                f"loss band is {self.band_low}..{self.band_high}; it must hold 1, the ratio of "
                "tokens written by the learner's own weights"
            )

    def factor(
        self, student_logp_NV: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N], and which of them [N] were cut or dropped."""
        match self.correction:
            case Correction.none:
                weight_N = torch.ones_like(batch.engine_logp_N)
                return weight_N, torch.zeros_like(weight_N, dtype=torch.bool)
            case Correction.truncate | Correction.mask:
                gap_N = at_target(student_logp_NV, batch) - batch.engine_logp_N
            case Correction.sequence_truncate | Correction.sequence_mask:
                assert batch.sequence_gap_N is not None, (
                    "the student fills sequence gaps when asked"
                )
                gap_N = batch.sequence_gap_N
        ratio_N = gap_N.nan_to_num(nan=0.0).exp()  # NaN: no engine wrote it
        match self.correction:
            case Correction.truncate | Correction.sequence_truncate:
                return ratio_N.clamp(max=self.cap), ratio_N > self.cap
            case Correction.mask | Correction.sequence_mask:
                outside_N = (ratio_N < self.band_low) | (ratio_N > self.band_high)
                return ratio_N.masked_fill(outside_N, 0.0), outside_N


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """``batch.weight_N`` (None is 1) times what a weigher and a corrector say, without gradient."""

    weigher: Weigher = field(default_factory=Weigher)
    corrector: Corrector = field(default_factory=Corrector)

    @torch.no_grad()
    def __call__(
        self, student_logp_NV: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[N], and metrics: ``loss/weighting`` its mean, ``loss/correction_share`` of tokens touched."""
        weighting_N = self.weigher.factor(student_logp_NV, batch)
        correction_N, touched_N = self.corrector.factor(student_logp_NV, batch)
        sums = {}
        if self.weigher.weighting is not Weighting.uniform:
            sums["loss/weighting"] = weighting_N.sum()
        if self.corrector.correction is not Correction.none:
            sums["loss/correction"] = correction_N.sum()
            sums["loss/correction_share"] = touched_N.float().sum()
        factor_N = weighting_N * correction_N
        return factor_N if batch.weight_N is None else factor_N * batch.weight_N, sums


def at_target(logp_NV: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Log-probs [N] of the targets; -inf becomes -1e4, with no gradient."""
    return logp_NV.gather(-1, batch.target_N[:, None]).squeeze(-1).clamp(min=-MAX_LOG_RATIO)


def _entropy_share(logp_NJ: torch.Tensor, buckets: int | torch.Tensor) -> torch.Tensor:
    """-sum p log p / log buckets, [N]."""
    terms_NJ = logp_NJ.exp().mul_(logp_NJ.clamp(min=-MAX_LOG_RATIO))
    largest_N = torch.as_tensor(buckets, device=logp_NJ.device).clamp(min=2).log()
    return (-terms_NJ.sum(dim=-1) / largest_N.to(logp_NJ.dtype)).clamp(0.0, 1.0)
