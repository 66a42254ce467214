"""No teacher: for losses that need none."""

from collections.abc import Sequence

from opd.types import FloatArray, Rollout, ScoredRollout, TeacherInfo


class NoTeacher:
    """A ``Teacher`` that adds no scores; ``vocab_size`` and ``max_length`` are the student's."""

    def __init__(self, *, vocab_size: int, max_length: int) -> None:
        self._info = TeacherInfo(
            model="none",
            vocab_size=vocab_size,
            hidden_size=0,
            tokenizer_fingerprint="",
            tokenizer_size=vocab_size,
            max_length=max_length,
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        return [ScoredRollout(rollout=rollout) for rollout in rollouts]

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._info

    def head(self, name: str | None = None) -> FloatArray:
        """There is none; never called where no scores are requested."""
        raise AssertionError("teacher=none has no head")
