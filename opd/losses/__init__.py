"""What the student is asked to lower: pure functions of log-probs and a batch, sums out."""

from opd.losses.divergence import Divergence
from opd.losses.token_weights import Corrector, Factors, Weigher
from opd.losses.mismatch import mismatch_metrics
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.losses.with_reward import Rewarded
from opd.types import Correction, DivergenceKind, Surrogate, Weighting

__all__ = [
    "Correction",
    "Corrector",
    "Divergence",
    "DivergenceKind",
    "Factors",
    "NegativeLogLikelihood",
    "PolicyGradient",
    "Rewarded",
    "Surrogate",
    "Weigher",
    "Weighting",
    "mismatch_metrics",
]
