"""A teacher in the trainer's process: the same scores as a server's, by the same code."""

from collections.abc import Sequence
from dataclasses import replace

from opd.config.student import DType
from opd.interfaces import Progress
from opd.teacher.backend import Backend
from opd.teacher.batches import group_by_tokens, progress_bar
from opd.teacher.response import compute_hidden, require_answerable, score_request
from opd.teacher.scoring import folded_head
from opd.teacher.transport import transports
from opd.teacher.vocabulary import Vocabulary, require_fit
from opd.teacher.wire import scored_rollouts, wire_request_from
from opd.types import FloatArray, Rollout, ScoredRollout, ScoreRequest, TeacherInfo


class LocalTeacher:
    """Scores with ``backend`` (usually a ``TorchBackend``), ``max_num_batched_tokens`` at a time.

    ``ValueError`` at construction when its vocabulary does not fit the student's.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        request: ScoreRequest,
        student: Vocabulary,
        max_num_batched_tokens: int = 16384,
        hidden_dtype: DType = DType.auto,
        progress: Progress | None = None,
    ) -> None:
        self.backend = backend
        self.request = request
        self.vocab_size = require_fit(backend.info, student)
        self._transport, *_ = transports(
            backend.info, request, vocab_size=self.vocab_size, hidden_dtype=hidden_dtype
        )
        self.max_num_batched_tokens = max_num_batched_tokens
        self.progress = progress

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        scored: list[ScoredRollout] = []
        with progress_bar(self.progress, rollouts) as advance:
            for group in group_by_tokens(rollouts, self.max_num_batched_tokens):
                scored += self._score_group(group)
                advance(len(group))
        return scored

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self.backend.info

    def head(self, name: str | None = None) -> FloatArray:
        """Rows [vocab_size, D] of the common ids, the logit scale included."""
        spec = replace(self.backend.spec, vocab_size=self.vocab_size)
        return folded_head(self.backend.head_VD, spec).numpy()

    def _score_group(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        wire_request = wire_request_from(
            rollouts,
            self.request,
            want=self._transport.want,
            vocab_size=self.vocab_size,
            hidden_dtype=self._transport.hidden_dtype,
        )
        require_answerable(wire_request, self.backend.info, self.backend.spec)
        (hidden_ND,) = compute_hidden(self.backend, [wire_request])
        return scored_rollouts(rollouts, score_request(self.backend, wire_request, hidden_ND))
