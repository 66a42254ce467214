"""``loss=uld``: the loss over two vocabularies, and which losses fit ``teacher.tokenizer``."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from opd.config.fields import bounded
from opd.config.loss import DistanceLossConfig
from opd.config.teacher import TeacherTokenizer, has_teacher
from opd.types import DivergenceKind, ScoreRequest, Weighting

if TYPE_CHECKING:
    from opd.config.schema import Config


class Unmatched(StrEnum):
    """What becomes of tokens that only one of two vocabularies has.

    sorted: both sides' are sorted by probability and subtracted (ULD, and GOLD's hybrid). prefix: each counts
    to the longest common token that its text begins with, others to a tail bucket.
    """

    sorted = "sorted"
    prefix = "prefix"


@dataclass(kw_only=True, slots=True)
class UldLossConfig(DistanceLossConfig):
    """A distance between distributions over two vocabularies, for teacher.tokenizer=own."""

    kind: DivergenceKind = DivergenceKind.jsd
    """Which divergence compares texts that are tokens of both sides."""
    unmatched: Unmatched = Unmatched.sorted
    """Tokens that one side alone has: sorted by probability (ULD, GOLD), or counted to common prefixes."""
    matched_weight: float = bounded(1.0, least=0)
    """Weight of the divergence over texts that both sides have."""
    unmatched_weight: float = bounded(1.0, least=0)
    """unmatched=sorted: weight of the difference of the sorted probabilities."""

    def request(self, temperature: float = 1.0) -> ScoreRequest:
        return ScoreRequest(full=True, temperature=temperature)


CHOICES: dict[str, Any] = {"uld": UldLossConfig}


def a_loss_fits_the_tokenizers(config: "Config") -> str | None:
    """A teacher with its own tokenizer has no distribution over the student's ids."""
    is_uld = isinstance(config.loss, UldLossConfig)
    if config.teacher.tokenizer == TeacherTokenizer.shared:
        return (
            "loss=uld compares distributions over two vocabularies: set teacher.tokenizer=own, or use "
            "loss=reverse_kl or another divergence"
            if is_uld
            else None
        )
    request = config.loss.request()
    if (
        has_teacher(config)
        and not is_uld
        and (request.full or request.top_k or config.loss.engine_support_k())
    ):
        return (
            "teacher.tokenizer=own and a loss over the student's ids, which mean other tokens to the "
            "teacher: use loss=policy_gradient (sampled tokens) or loss=uld (distributions)"
        )
    if is_uld and config.loss.weighting == Weighting.teacher_entropy:
        return (
            "loss.weighting=teacher_entropy cannot be used with loss=uld, whose teacher has a distribution "
            "at the last token of a span only: use loss.weighting=uniform, student_entropy or gap"
        )
    return None


RULES = (a_loss_fits_the_tokenizers,)
