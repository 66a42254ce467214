"""What the student minimises."""

from dataclasses import dataclass
from enum import StrEnum

from opd.config.knobs import knob
from opd.types import DivergenceKind, Importance


class Support(StrEnum):
    full = "full"
    teacher_top_k = "teacher_top_k"
    student_top_k = "student_top_k"
    union = "union"


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What the student minimises."""


@dataclass(kw_only=True, slots=True)
class DivergenceLossConfig(LossConfig):
    """GKD style: a divergence between the two distributions at every token."""

    kind: DivergenceKind = DivergenceKind.reverse_kl
    """Which divergence."""
    support: Support = Support.full
    """The whole vocabulary, or k ids (the teacher's, the student's, both) and a tail bucket."""
    k: int = knob(32, least=1)
    """Size of a truncated support."""
    beta: float = knob(0.5, least=0, most=1)
    """Weight of the teacher in the mixture of jsd; 0 is forward and 1 is reverse KL."""
    skew: float = knob(0.1, least=0, below=1)
    """Share of the first distribution mixed into the second one by the skewed divergences."""


@dataclass(kw_only=True, slots=True)
class PolicyGradientLossConfig(LossConfig):
    """Sampled-token reverse KL as a per-token advantage."""

    importance: Importance = Importance.clip
    """Correction between engine and learner: clip (PPO), truncate (TIS), mask (band), none."""
    clip_low: float = knob(0.2, above=0, most=1)
    """importance=clip: the ratio is held above 1 - clip_low."""
    clip_high: float = knob(0.28, above=0)
    """importance=clip: the ratio is held below 1 + clip_high."""
    cap: float = knob(2.0, above=0)
    """importance=truncate: largest weight of a token."""
    band_low: float = knob(0.5, least=0)
    """importance=mask: tokens whose ratio is below are dropped."""
    band_high: float = knob(2.0, above=0)
    """importance=mask: tokens whose ratio is above are dropped."""
    advantage_clip: float | None = knob(None, above=0)
    """Hold the advantage within plus and minus this many nats."""
    discount: float = knob(0.0, least=0, most=1)
    """Credit a token with the discounted advantages that follow it; 0 is the token's own only."""
