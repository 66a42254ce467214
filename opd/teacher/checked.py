"""A teacher whose scores are checked before anything is learned from them."""

from collections.abc import Sequence

import numpy as np

from opd.faults import RunError
from opd.interfaces import Teacher
from opd.types import FloatArray, Rollout, ScoredRollout, SupportLogps, TeacherInfo

ABOVE = 1e-3
"""Rounding of a log-prob that should be at most 0, and of two computations of the same one, in nats."""
SUM = 1e-2
"""Rounding of the logarithm of a sum of probabilities that should be 1."""
BF16_EXPONENT = 0x7F80
"""Bits of a bfloat16 that are all set in infinities and NaN."""


class CheckedTeacher:
    """A ``Teacher`` that refuses scores of ``teacher`` that no model can have given.

    Log-probs are finite and at most 0, distributions sum to 1 with their tails, and a sampled token's
    log-prob is the one that its distribution gives it: this finds shifted and reversed rows.
    """

    def __init__(self, teacher: Teacher) -> None:
        self._teacher = teacher

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``. Raises RunError with teacher, prompt and fault for scores that cannot be."""
        scored = self._teacher.score(rollouts)
        for each in scored:
            fault = find_fault(each)
            if fault is not None:
                raise RunError(
                    f"the teacher {self.info().model} answered with scores that cannot be, for a "
                    f"completion of prompt {each.rollout.prompt.uid}: {fault}; look at the log of its "
                    "server, or at the model"
                )
        return scored

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._teacher.info()

    def head(self, name: str | None = None) -> FloatArray:
        """See ``Teacher``."""
        return self._teacher.head(name)


def find_fault(scored: ScoredRollout) -> str | None:
    """What is wrong with the scores of a completion, or None."""
    ids_T = scored.rollout.token_ids
    faults = [
        None if scored.logps is None else _not_a_logp(scored.logps),
        None if scored.support is None else _support_fault(scored.support, scored.logps, ids_T),
        None
        if scored.full_logps is None
        else _distribution_fault(scored.full_logps, scored.logps, ids_T),
        None if scored.hidden is None else _hidden_fault(scored.hidden),
        None if scored.outside is None else _share_fault(scored.outside),
    ]
    return next((fault for fault in faults if fault is not None), None)


def _first(wrong: np.ndarray) -> int | None:
    return int(np.argmax(wrong)) if wrong.any() else None


def _not_a_logp(logps_T: FloatArray) -> str | None:
    t = _first(~(np.isfinite(logps_T) & (logps_T <= ABOVE)))
    return None if t is None else f"the log-prob of token {t} is {logps_T[t]}"


def _support_fault(
    support: SupportLogps, sampled_T: FloatArray | None, ids_T: np.ndarray
) -> str | None:
    used_TK = support.ids >= 0
    logps_TK = np.where(used_TK, support.logps, -np.inf)
    t = _first((used_TK & ~(logps_TK <= ABOVE)).any(1) | ~(support.tail_logp <= ABOVE))
    if t is not None:
        return f"a log-prob of the {used_TK[t].sum()} ids at token {t} is above 0 or no number"
    with np.errstate(invalid="ignore"):
        sums_T = np.logaddexp(np.logaddexp.reduce(logps_TK, axis=1), support.tail_logp)
    t = _first(~(np.abs(sums_T) <= SUM))
    if t is not None:
        return f"the probabilities at token {t} sum to {np.exp(sums_T[t]):.3g} with their tail"
    if sampled_T is None:
        return None
    is_sampled_TK = support.ids == ids_T[:, None]
    own_T = np.where(is_sampled_TK, logps_TK, -np.inf).max(1, initial=-np.inf)
    return _disagreement(own_T, sampled_T, is_sampled_TK.any(1))


def _distribution_fault(
    logps_TV: FloatArray, sampled_T: FloatArray | None, ids_T: np.ndarray
) -> str | None:
    with np.errstate(invalid="ignore"):
        sums_T = np.logaddexp.reduce(logps_TV.astype(np.float32), axis=1)
    t = _first(~(np.abs(sums_T) <= SUM) | (logps_TV > ABOVE).any(1))
    if t is not None:
        return f"the probabilities at token {t} sum to {np.exp(sums_T[t]):.3g}"
    if sampled_T is None:
        return None
    known_T = ids_T < logps_TV.shape[1]
    own_T = logps_TV[np.arange(len(ids_T)), np.where(known_T, ids_T, 0)]
    return _disagreement(own_T, sampled_T, known_T)


def _disagreement(own_T: np.ndarray, sampled_T: FloatArray, known_T: np.ndarray) -> str | None:
    """Two log-probs of one token, in nats; rounding of a large one grows with it."""
    with np.errstate(invalid="ignore"):
        gap_T = np.abs(own_T - sampled_T)
    t = _first(known_T & ~(gap_T <= ABOVE * (1 + np.abs(sampled_T))))
    if t is None:
        return None
    return f"token {t} has log-prob {sampled_T[t]:.4g}, and {own_T[t]:.4g} in its distribution"


def _hidden_fault(hidden_TD: np.ndarray) -> str | None:
    """Of the first and last hidden state; any other gives a log-prob that is no number."""
    ends = hidden_TD[[0, -1]] if len(hidden_TD) else hidden_TD
    is_bits = ends.dtype == np.uint16
    wrong = (ends & BF16_EXPONENT) == BF16_EXPONENT if is_bits else ~np.isfinite(ends)
    return "a hidden state is not finite" if wrong.any() else None


def _share_fault(share_T: FloatArray) -> str | None:
    t = _first(~((share_T >= -ABOVE) & (share_T <= 1 + ABOVE)))
    return (
        None if t is None else f"a probability beyond the common ids at token {t} is {share_T[t]}"
    )
