"""Two tokenizations of one text: the smallest spans that both divide it into."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from opd.types import FloatArray


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of the student and of the teacher that cover the same text; the ends are exclusive."""

    student_start: int
    student_end: int
    teacher_start: int
    teacher_end: int

    @property
    def student_tokens(self) -> int:
        return self.student_end - self.student_start

    @property
    def teacher_tokens(self) -> int:
        return self.teacher_end - self.teacher_start


def align(student: Sequence[int | None], teacher: Sequence[int | None]) -> list[Span]:
    """The spans of two tokenizations, in order; every token is in exactly one.

    Each argument has the position in the text at which each token ends; None is a position inside a
    character, which is no boundary. A span ends wherever a token of both sides ends, so no span can be
    divided further. A token of no text belongs to the span in front of it. Tokens of the student
    behind the last common end are a span without tokens of the teacher; those of the teacher belong to
    the last span.
    """
    own = {end: index + 1 for index, end in enumerate(student) if end}
    other = {end: index + 1 for index, end in enumerate(teacher) if end}
    cuts = sorted((own[end], other[end]) for end in own.keys() & other.keys())
    whole = (len(student), len(teacher))
    if not student:
        return []
    if not cuts or cuts[-1][0] < whole[0]:
        cuts.append(whole)
    cuts[-1] = whole
    starts = [(0, 0), *cuts[:-1]]
    return [
        Span(*own_part, *teacher_part)
        for own_part, teacher_part in (
            zip(start, cut, strict=True) for start, cut in zip(starts, cuts, strict=True)
        )
    ]


def shared_logps(spans: Sequence[Span], teacher: FloatArray, engine: FloatArray) -> FloatArray:
    """The teacher's log-probs [T] on the student's tokens, whose sum over each span is the teacher's.

    ``teacher`` are the log-probs of its own tokens, ``engine`` [T] those that the engine wrote. The
    difference of the two sums over a span of k tokens is divided evenly,

        log p_i = log q_i + (sum over the span of log p - log q) / k,

    so all tokens of a span have the same advantage log p_i - log q_i, and a teacher that agrees
    about a span gives none of its tokens any. Where no engine wrote the tokens (NaN), each has a k-th of
    the teacher's sum. A span without tokens of the teacher keeps the engine's log-probs, 0 where there
    are none.
    """
    logps = np.empty(len(engine), np.float32)
    for span in spans:
        rows = slice(span.student_start, span.student_end)
        own = engine[rows].astype(np.float64)
        total = float(teacher[span.teacher_start : span.teacher_end].sum(dtype=np.float64))
        if span.teacher_tokens == 0:
            logps[rows] = np.nan_to_num(own)
        elif span.student_tokens == 1 or np.isnan(own).any():
            logps[rows] = total / span.student_tokens
        else:
            logps[rows] = own + (total - own.sum()) / span.student_tokens
    return logps
