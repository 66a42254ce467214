"""A teacher behind HTTP: splits rollouts into requests, sends a few at a time, retries."""

import math
from collections.abc import Sequence

import numpy as np

from opd.config.teacher import ServedTeacherConfig
from opd.interfaces import Progress
from opd.serving.app import MEDIA_TYPE
from opd.serving.client import ServiceClient, parsed
from opd.teacher.answer import require_answer
from opd.teacher.batches import group_by_tokens, progress_bar, score_concurrently
from opd.teacher.transport import bytes_per_target, transports
from opd.teacher.vocabulary import Vocabulary, require_fit
from opd.teacher.wire import (
    WireRequest,
    read_head_rows,
    read_response,
    request_bytes,
    scored_rollouts,
    wire_request_from,
)
from opd.types import FloatArray, Rollout, ScoredRollout, ScoreRequest, TeacherInfo

HEAD_BYTES = 64 << 20  # of one chunk of the head
HEADER_BYTES = 1 << 16
"""More than the header of any response."""


def server_connection(config: ServedTeacherConfig, url: str, token: str | None) -> ServiceClient:
    """A connection to one teacher server."""
    return ServiceClient(
        url,
        name="the teacher",
        remedy="is it running? (start one with `opd teacher model=MODEL`)",
        token=token,
        timeout=config.timeout,
        retries=config.retries,
    )


class ServerTeacher:
    """Scores over HTTP; safe to call from several threads.

    The server's ``TeacherInfo`` is read at construction. ``ValueError`` when its vocabulary does not
    fit the student's or it refuses a request; ``ConnectionError`` when the last of ``config.retries``
    retries fails, or when the server makes no progress for ``config.timeout`` seconds.
    A request has at most ``batch_tokens`` tokens and its response at most ``response_bytes`` (a longer
    rollout is sent alone); ``connections`` requests are open at a time. For ``config.hidden_dtype``
    see ``transports``.
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
        response_bytes: int = 256 << 20,
        connections: int = 4,
        progress: Progress | None = None,
    ) -> None:
        self.url, self.request = url, request
        self.batch_tokens, self.response_bytes = batch_tokens, response_bytes
        self.connections, self.progress = connections, progress
        self._service = server_connection(config, url, token)
        self._info = parsed(
            self._service.send("GET", "/info"),
            lambda response: TeacherInfo(**response.json()),
            "the description of an opd teacher",
        )
        self.vocab_size = require_fit(self._info, student)
        self._transport, *_ = transports(
            self._info, request, vocab_size=self.vocab_size, hidden_dtype=config.hidden_dtype
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        groups = self.groups(rollouts)
        with progress_bar(self.progress, rollouts) as advance:
            return score_concurrently(
                self.score_group, groups, max_concurrent=self.connections, advance=advance
            )

    def info(self) -> TeacherInfo:
        """See ``Teacher``; read at construction."""
        return self._info

    def head(self, name: str | None = None) -> FloatArray:
        """Rows [vocab_size, D] of the common ids, the model's logit scale included.

        Fetched in chunks at every call, in bfloat16 where that loses nothing; ``TeacherHeads`` keeps it.
        """
        rows, width = self.vocab_size, self._info.hidden_size
        head_VD = np.empty((rows, width), np.float32)
        step = max(1, HEAD_BYTES // (4 * width))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            head_VD[start:stop] = self._head_rows(start, stop)
        return head_VD

    def _head_rows(self, start: int, stop: int) -> FloatArray:
        size = 4 * (stop - start) * self._info.hidden_size
        path = f"/head?start={start}&stop={stop}&bfloat16=true"
        return parsed(
            self._service.send("GET", path, max_bytes=size + HEADER_BYTES),
            lambda response: read_head_rows(response.content),
            "rows of an output head",
        )

    def groups(self, rollouts: Sequence[Rollout], *, servers: int = 1) -> list[list[Rollout]]:
        """Groups of neighbours, one request each; at least one for each of ``servers``, if possible.

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
                "with a larger max_model_len"
            )
        per_target = self._bytes_per_target(self._request(rollouts[:1]))
        tokens = min(self.batch_tokens, math.ceil(sum(lengths) / servers))
        return group_by_tokens(rollouts, tokens, targets=self.response_bytes // per_target)

    def score_group(
        self, rollouts: Sequence[Rollout], *, retries: int | None = None
    ) -> list[ScoredRollout]:
        """Score by one request, with ``retries`` retries (default: ``config.retries``)."""
        request = self._request(rollouts)
        response = self._service.send(
            "POST",
            "/score",
            request_bytes(request),
            {"Content-Type": MEDIA_TYPE},
            retries=retries,
            tokens=len(request.token_ids),
            max_bytes=len(request.targets()) * self._bytes_per_target(request) + HEADER_BYTES,
        )
        scores = parsed(
            response,
            lambda r: require_answer(read_response(r.content), request),
            "scores of an opd teacher",
        )
        return scored_rollouts(rollouts, scores)

    def _bytes_per_target(self, request: WireRequest) -> int:
        return bytes_per_target(
            self._info,
            want=request.want,
            hidden_dtype=request.hidden_dtype,
            support=request.support_width(),
            vocab_size=self.vocab_size,
        )

    def _request(self, rollouts: Sequence[Rollout]) -> WireRequest:
        return wire_request_from(
            rollouts,
            self.request,
            want=self._transport.want,
            vocab_size=self.vocab_size,
            hidden_dtype=self._transport.hidden_dtype,
        )
