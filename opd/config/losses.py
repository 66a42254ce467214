"""What the student minimises."""

from dataclasses import dataclass
from enum import StrEnum

from opd.config.fields import knob
from opd.types import Correction, DivergenceKind, Normalisation, Surrogate, Weighting


class Support(StrEnum):
    full = "full"
    teacher_top_k = "teacher_top_k"
    student_top_k = "student_top_k"
    union = "union"
    intersection = "intersection"


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What the student minimises."""

    normalise: Normalisation = Normalisation.token
    """Divide a step's sum by tokens, by sequences (each by its own tokens first), or by a constant."""
    first_share: float = knob(1.0, above=0, most=1)
    """Share of each completion, from its start, that is learned from."""
    weighting: Weighting = Weighting.uniform
    """Factor of each token in [0, 1]: 1, the student's or the teacher's entropy, or their gap."""
    gap_clip: float = knob(5.0, above=0)
    """weighting=gap: this many nats between teacher and student about the sampled token, or more, weigh 1."""
    correction: Correction = Correction.none
    """Importance weight learner / engine of a token or its completion, capped or dropped outside a band."""
    cap: float = knob(2.0, above=0)
    """correction=truncate, sequence_truncate: largest weight."""
    band_low: float = knob(0.5, least=0, most=1)
    """correction=mask, sequence_mask: what has a smaller ratio is dropped."""
    band_high: float = knob(2.0, least=1)
    """correction=mask, sequence_mask: what has a larger ratio is dropped."""
    reward_weight: float = knob(0.0, least=0)
    """Weight of the policy gradient on the reward's advantage; 0 is none."""
    clip_low: float = knob(0.2, above=0, most=1)
    """Policy gradients with surrogate=clip: the ratio is held above 1 - clip_low."""
    clip_high: float = knob(0.28, above=0)
    """Policy gradients with surrogate=clip: the ratio is held below 1 + clip_high."""


@dataclass(kw_only=True, slots=True)
class DivergenceLossConfig(LossConfig):
    """GKD style: a divergence between the two distributions at every token."""

    kind: DivergenceKind = DivergenceKind.reverse_kl
    """Which divergence."""
    support: Support = Support.full
    """The whole vocabulary, or k ids (the teacher's, the student's, of either, of both) and a tail bucket."""
    k: int = knob(32, least=1)
    """Size of a truncated support."""
    beta: float = knob(0.5, least=0, most=1)
    """Weight of the teacher in the mixture of jsd; 0 is forward and 1 is reverse KL."""
    skew: float = knob(0.1, least=0, below=1)
    """Share of the first distribution mixed into the second one by the skewed divergences."""
    clip: float | None = knob(None, above=0)
    """Hold each token's divergence at this many nats; beyond, it has no gradient."""


@dataclass(kw_only=True, slots=True)
class PolicyGradientLossConfig(LossConfig):
    """Sampled-token reverse KL as a per-token advantage."""

    surrogate: Surrogate = Surrogate.clip
    """clip: PPO's ratio to the engine, held in its range; plain: the log-prob, for use with a correction."""
    teacher_weight: float = knob(1.0, above=0)
    """Weight of the teacher's part of the advantage, beside reward_weight."""
    advantage_clip: float | None = knob(None, above=0)
    """Hold the teacher's part of the advantage within plus and minus this many nats."""
    discount: float = knob(0.0, least=0, most=1)
    """Credit a token with the discounted advantages that follow it; 0 is the token's own only."""


@dataclass(kw_only=True, slots=True)
class GrpoLossConfig(LossConfig):
    """GRPO: a reward's advantage against the other completions of the same prompt."""

    reward_weight: float = knob(1.0, above=0)
    """Weight of the policy gradient on the reward's advantage."""
    surrogate: Surrogate = Surrogate.clip
    """clip: PPO's ratio to the engine, held in its range; plain: the log-prob, for use with a correction."""
    kl: float = knob(0.0, least=0)
    """Weight of the k3 estimate of KL to the teacher, who is the reference policy here; 0 asks for none."""


@dataclass(kw_only=True, slots=True)
class NllLossConfig(LossConfig):
    """Supervised fine-tuning: the negative log-likelihood of each token; nobody scores."""
