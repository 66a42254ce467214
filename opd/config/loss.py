"""``loss``: what the student minimises, and what each loss needs of a teacher."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from opd.config.fields import bounded
from opd.types import (
    Correction,
    DivergenceKind,
    Reduction,
    ScoreRequest,
    Surrogate,
    Weighting,
)

if TYPE_CHECKING:
    from opd.config.schema import Config


class Support(StrEnum):
    """Ids that a divergence sums over: all, or the k likeliest of teacher, student, either or both."""

    full = "full"
    teacher_top_k = "teacher_top_k"
    student_top_k = "student_top_k"
    union = "union"
    intersection = "intersection"


STUDENT_SUPPORTS = (Support.student_top_k, Support.union, Support.intersection)
"""Supports that need the engine's likeliest ids, which it reports as it generates."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What the student minimises."""

    reduction: Reduction = Reduction.token
    """Divide a step's sum by tokens, by sequences (each by its own tokens first), or by a constant."""
    prefix_fraction: float = bounded(1.0, above=0, most=1)
    """Share of each completion, from its start, that is learned from."""
    weighting: Weighting = Weighting.uniform
    """Weight of each token in [0, 1]: 1, the student's or the teacher's entropy, or their gap."""
    gap_clip: float = bounded(5.0, above=0)
    """weighting=gap: this many nats between teacher and student about the sampled token, or more, weigh 1."""
    correction: Correction = Correction.none
    """Importance ratio, truncated or masked: a token's, or a completion's product or geometric mean."""
    correction_cap: float = bounded(2.0, above=0)
    """correction=truncate, sequence_truncate, geometric_truncate: largest ratio."""
    correction_min: float = bounded(0.5, least=0, most=1)
    """correction=mask, sequence_mask, geometric_mask: tokens with a smaller ratio are dropped."""
    correction_max: float = bounded(2.0, least=1)
    """correction=mask, sequence_mask, geometric_mask: tokens with a larger ratio are dropped."""
    reward_weight: float = bounded(0.0, least=0)
    """Weight of the policy gradient on the reward's advantage; 0 is none."""
    clip_ratio_low: float = bounded(0.2, above=0, most=1)
    """Policy gradients with surrogate=clip: the ratio is clipped to at least 1 - clip_ratio_low."""
    clip_ratio_high: float = bounded(0.28, above=0)
    """Policy gradients with surrogate=clip: the ratio is clipped to at most 1 + clip_ratio_high."""

    def request(self, temperature: float = 1.0) -> ScoreRequest:
        """What this loss needs of a teacher, at the sampling temperature."""
        return ScoreRequest(sampled=False, temperature=temperature)

    def engine_support_k(self) -> int:
        """How many of its likeliest ids per position the engine must report; 0 for none."""
        return 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss cannot do without a teacher's log-probs."""
        return self.request().sampled


@dataclass(kw_only=True, slots=True)
class DistanceLossConfig(LossConfig):
    """What losses made of a divergence have in common."""

    kind: DivergenceKind = DivergenceKind.reverse_kl
    """Which divergence."""
    beta: float = bounded(0.5, least=0, most=1)
    """Weight of the teacher in the mixture of jsd; 0 is forward and 1 is reverse KL."""
    skew: float = bounded(0.1, least=0, below=1)
    """Share of the first distribution mixed into the second one by the skewed divergences."""


@dataclass(kw_only=True, slots=True)
class DivergenceLossConfig(DistanceLossConfig):
    """GKD style: a divergence between the two distributions at every token."""

    support: Support = Support.full
    """The whole vocabulary, or k ids (the teacher's, the student's, of either, of both) and a tail bucket."""
    k: int = bounded(32, least=1)
    """Size of a truncated support."""
    token_clip: float | None = bounded(None, above=0)
    """Clamp each token's divergence at this many nats; a clamped one has no gradient."""

    def request(self, temperature: float = 1.0) -> ScoreRequest:
        if self.support == Support.full:
            return ScoreRequest(full=True, temperature=temperature)
        return ScoreRequest(
            top_k=0 if self.support == Support.student_top_k else self.k,
            # an intersection needs the teacher's ids only: the engine's are in the rollouts
            rollout_support=self.support in (Support.student_top_k, Support.union),
            temperature=temperature,
        )

    def engine_support_k(self) -> int:
        return self.k if self.support in STUDENT_SUPPORTS else 0


@dataclass(kw_only=True, slots=True)
class PolicyGradientLossConfig(LossConfig):
    """A policy gradient on sampled tokens: the teacher's log-prob as a reward, a verifier's, or both."""

    surrogate: Surrogate = Surrogate.clip
    """clip: PPO's clipped ratio to the engine; plain: the log-prob, for use with a correction."""
    teacher_weight: float = bounded(1.0, least=0)
    """Weight of the teacher's part of the advantage (sampled-token reverse KL), beside reward_weight."""
    advantage_clip: float | None = bounded(None, above=0)
    """Clamp the teacher's part of the advantage to plus and minus this many nats."""
    discount: float = bounded(0.0, least=0, most=1)
    """Credit a token with the discounted advantages that follow it; 0 is the token's own only."""
    kl_coef: float = bounded(0.0, least=0)
    """Weight of the k3 estimate of KL to the teacher as reference policy; 0 is none."""

    def request(self, temperature: float = 1.0) -> ScoreRequest:
        needed = bool(self.teacher_weight or self.kl_coef)
        return ScoreRequest(sampled=needed, temperature=temperature)


@dataclass(kw_only=True, slots=True)
class NllLossConfig(LossConfig):
    """Supervised fine-tuning: the negative log-likelihood of each token; no teacher."""


class TeacherInput(StrEnum):
    """What a loss in a file needs of the teacher."""

    none = "none"
    sampled = "sampled"
    top_k = "top_k"
    full = "full"


@dataclass(kw_only=True, slots=True)
class FunctionLossConfig(LossConfig):
    """A loss of your own: a class in a Python file (docs/extending.md)."""

    path: str = MISSING
    """path.py:Name or module:Name of a class that takes this config; see docs/extending.md."""
    teacher: TeacherInput = TeacherInput.full
    """What it needs: nothing, the sampled tokens' log-probs, the k likeliest ids, or all log-probs."""
    k: int = bounded(32, least=1)
    """teacher=top_k: how many ids."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of your own; the class reads them from config.options."""

    def request(self, temperature: float = 1.0) -> ScoreRequest:
        return ScoreRequest(
            sampled=self.teacher != TeacherInput.none,
            top_k=self.k if self.teacher == TeacherInput.top_k else 0,
            full=self.teacher == TeacherInput.full,
            temperature=temperature,
        )


CHOICES: dict[str, Any] = {
    **{kind.value: DivergenceLossConfig(kind=kind) for kind in DivergenceKind},
    "topk_forward_kl": DivergenceLossConfig(
        kind=DivergenceKind.forward_kl, support=Support.teacher_top_k
    ),
    "topk_reverse_kl": DivergenceLossConfig(
        kind=DivergenceKind.reverse_kl, support=Support.teacher_top_k
    ),
    "policy_gradient": PolicyGradientLossConfig,
    "grpo": PolicyGradientLossConfig(teacher_weight=0.0, reward_weight=1.0),
    "nll": NllLossConfig,
    "function": FunctionLossConfig,
}


def off_policy_completions_can_be_learned_from(config: "Config") -> str | None:
    """Some losses are defined for tokens that the student itself sampled."""
    if config.rollout.on_policy == 1:
        return None
    found = f"rollout.on_policy={config.rollout.on_policy:g}"
    if isinstance(config.loss, PolicyGradientLossConfig):
        return (
            f"{found} and a policy gradient, which is about tokens that the student sampled: use "
            "rollout.on_policy=1, or a divergence"
        )
    if isinstance(config.loss, DivergenceLossConfig) and config.loss.engine_support_k():
        return (
            f"{found} and loss.support={config.loss.support}, whose ids the engine reports as "
            "it generates: use loss.support=full or teacher_top_k"
        )
    return None


def a_weighting_has_its_inputs(config: "Config") -> str | None:
    """A loss that does not get the teacher's scores cannot weight tokens by them."""
    request = config.loss.request()
    if not request.sampled:
        refused, reason = (Weighting.teacher_entropy, Weighting.gap), "needs no teacher"
    elif not (request.full or request.top_k or request.rollout_support):
        refused, reason = (Weighting.teacher_entropy,), "needs the teacher for sampled tokens only"
    else:
        return None
    found = config.loss.weighting
    if found in refused:
        return (
            f"loss.weighting={found} cannot be used with a loss that {reason}: use a divergence, or "
            f"loss.weighting={' or '.join(w for w in Weighting if w not in refused)}"
        )
    return None


def the_engine_is_corrected_for_once(config: "Config") -> str | None:
    """PPO's ratio is already an importance ratio."""
    corrected = config.loss.correction != Correction.none
    match config.loss:
        case PolicyGradientLossConfig(surrogate=Surrogate.clip) if corrected:
            return (
                f"loss.correction={config.loss.correction} corrects a second time for the engine that "
                "loss.surrogate=clip divides by: use loss.surrogate=plain with a correction"
            )
    return None


def advantages_need_a_reward(config: "Config") -> str | None:
    """A policy gradient needs something to compare completions by."""
    loss = config.loss
    if isinstance(loss, PolicyGradientLossConfig) and not (
        loss.teacher_weight or loss.reward_weight
    ):
        return (
            "loss.teacher_weight=0 and loss.reward_weight=0 leave no advantage to learn from: set one "
            "of them above 0"
        )
    if config.reward.is_given:
        return None
    if isinstance(loss, PolicyGradientLossConfig) and not loss.teacher_weight:
        return "loss=grpo learns from rewards alone: use reward=grader or reward=function"
    if loss.reward_weight:
        return (
            f"loss.reward_weight={loss.reward_weight:g} needs a reward: use reward=grader or "
            "reward=function"
        )
    return None


RULES = (
    off_policy_completions_can_be_learned_from,
    a_weighting_has_its_inputs,
    the_engine_is_corrected_for_once,
    advantages_need_a_reward,
)
