"""Spans of text that the tokens of student and teacher both divide a completion into, by student's token."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanRows:
    """What a divergence over two vocabularies reads of each of T completion tokens of the student.

    ``ids`` [T] int32: the number of the token's span, -1 where it is not compared. At the last token of
    each span, where the teacher's distribution of the span's last token stands too: ``targets`` [T]
    int32, the teacher's id of that token, -1 at other tokens; ``logps`` [T] float32, the
    teacher's log-prob of its earlier tokens in the span. ``single`` [T]: the span is one token on both sides.
    """

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    logps: npt.NDArray[np.float32]
    single: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        assert self.ids.shape == self.targets.shape == self.logps.shape == self.single.shape

    def kept_ids(self, keep: int) -> npt.NDArray[np.int32]:
        """``ids`` of the first ``keep`` tokens; a span of which the last token is not kept gets -1."""
        ids = self.ids[:keep].copy()
        if self.targets[keep - 1] < 0:
            ids[ids == ids[-1]] = -1
        return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonVocabulary:
    """Pairs of ids with the same text in both vocabularies, ``student_ids[m]`` and ``teacher_ids[m]``.

    No id is in more than one of the M pairs. ``student_buckets`` and ``teacher_buckets`` have for every id of
    each head the pair whose text its own begins with, the longest; M where there is none.
    """

    student_ids: npt.NDArray[np.int32]
    teacher_ids: npt.NDArray[np.int32]
    student_buckets: npt.NDArray[np.int32]
    teacher_buckets: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        assert self.student_ids.shape == self.teacher_ids.shape

    @classmethod
    def identical(cls, size: int) -> "CommonVocabulary":
        """One vocabulary of ``size`` ids on both sides."""
        ids = np.arange(size, dtype=np.int32)
        return cls(student_ids=ids, teacher_ids=ids, student_buckets=ids, teacher_buckets=ids)
