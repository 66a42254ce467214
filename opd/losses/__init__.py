"""What the student is asked to lower: pure functions of log-probs and a batch, sums out."""

from opd.losses.divergence import Divergence
from opd.losses.mismatch import mismatch_metrics
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.types import DivergenceKind, Importance

__all__ = [
    "Divergence",
    "DivergenceKind",
    "Importance",
    "NegativeLogLikelihood",
    "PolicyGradient",
    "mismatch_metrics",
]
