"""A teacher behind HTTP: splits, sends a few requests at once, retries, says what failed."""

import math
from collections.abc import Sequence

import numpy as np
from safetensors.numpy import load

from opd.config.teacher import ServedTeacherConfig
from opd.interfaces import Progress
from opd.serving.app import MEDIA_TYPE
from opd.serving.client import ServiceClient
from opd.teacher.batches import at_once, bar, by_tokens
from opd.teacher.transport import bytes_per_target, transports
from opd.teacher.vocabulary import Vocabulary, require_fit
from opd.teacher.wire import (
    WireRequest,
    read_answer,
    request_bytes,
    scored_rollouts,
    wire_request_from,
)
from opd.types import FloatArray, Rollout, ScoredRollout, ScoreRequest, TeacherInfo

HEAD_BYTES = 64 << 20  # of one piece of the head


class ServerTeacher:
    """Scores over HTTP; safe to call from several threads.

    Asks the server what it is at once. ``ValueError`` when its vocabulary does not fit the
    student's or it refuses a request; ``ConnectionError`` when it stays away, or fails, at the last
    of ``config.retries`` repetitions.
    A request carries at most ``batch_tokens`` tokens, its answer at most ``answer_bytes`` (a single
    longer rollout goes alone), and ``connections`` of them are under way at once. ``hidden_dtype``
    is that in which hidden states travel, see ``transports``.
    """

    def __init__(
        self,
        url: str,
        config: ServedTeacherConfig,
        *,
        request: ScoreRequest,
        student: Vocabulary,
        token: str | None = None,
        batch_tokens: int = 16384,
        answer_bytes: int = 256 << 20,
        connections: int = 4,
        progress: Progress | None = None,
    ) -> None:
        self.url, self.request = url, request
        self.batch_tokens, self.answer_bytes = batch_tokens, answer_bytes
        self.connections, self.progress = connections, progress
        self._service = ServiceClient(
            url,
            what="teacher",
            remedy="is it running? (start one with `opd teacher`)",
            token=token,
            timeout=config.timeout,
            retries=config.retries,
        )
        self._info = TeacherInfo(**self._service.send("GET", "/info").json())
        self.vocab_size = require_fit(self._info, student)
        self._transport, *_ = transports(
            self._info, request, vocab_size=self.vocab_size, hidden_dtype=config.hidden_dtype
        )
        self._head: FloatArray | None = None

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        with bar(self.progress, rollouts) as advance:
            return at_once(
                self.score_group, self.groups(rollouts), most=self.connections, advance=advance
            )

    def info(self) -> TeacherInfo:
        """See ``Teacher``; asked once, when this client was made."""
        return self._info

    def head(self, name: str | None = None) -> FloatArray:
        """Rows [vocab_size, D] of the ids that both sides have, the model's logit scale included.

        Fetched once, in pieces.
        """
        if self._head is None:
            rows = max(1, HEAD_BYTES // (4 * self._info.hidden_size))
            pieces = [
                self._service.send(
                    "GET", f"/head?start={start}&stop={min(start + rows, self.vocab_size)}"
                ).content
                for start in range(0, self.vocab_size, rows)
            ]
            self._head = np.concatenate([load(piece)["head"] for piece in pieces])
        return self._head

    def groups(self, rollouts: Sequence[Rollout], *, servers: int = 1) -> list[list[Rollout]]:
        """Neighbours that make one request each; at least one for each of ``servers``, if possible.

        ``ValueError`` when a sequence is longer than the teacher takes.
        """
        if not rollouts:
            return []
        lengths = [len(rollout.teacher_sequence) for rollout in rollouts]
        longest = max(lengths)
        if longest > self._info.max_length:
            raise ValueError(
                f"a rollout has {longest} tokens with its prompt, teacher {self._info.model} takes "
                f"at most {self._info.max_length}; lower rollout.max_tokens, or serve the teacher "
                "with a larger max_length"
            )
        per_target = bytes_per_target(
            self._info,
            want=self._transport.want,
            hidden_dtype=self._transport.hidden_dtype,
            support=self._request(rollouts[:1]).support_width(),
            vocab_size=self.vocab_size,
        )
        tokens = min(self.batch_tokens, math.ceil(sum(lengths) / servers))
        return by_tokens(rollouts, tokens, targets=self.answer_bytes // per_target)

    def score_group(
        self, rollouts: Sequence[Rollout], *, retries: int | None = None
    ) -> list[ScoredRollout]:
        """One request, tried again ``retries`` times (default: as often as this client does)."""
        body = request_bytes(self._request(rollouts))
        told = {"Content-Type": MEDIA_TYPE}
        answer = self._service.send("POST", "/score", body, told, retries=retries)
        return scored_rollouts(rollouts, read_answer(answer.content))

    def _request(self, rollouts: Sequence[Rollout]) -> WireRequest:
        return wire_request_from(
            rollouts,
            self.request,
            want=self._transport.want,
            vocab_size=self.vocab_size,
            hidden_dtype=self._transport.hidden_dtype,
        )
