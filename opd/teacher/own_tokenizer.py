"""A teacher that reads the student's text with a tokenizer of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from opd.interfaces import Teacher
from opd.spans import CommonVocabulary, SpanRows
from opd.teacher.alignment import Span, align, shared_logps
from opd.teacher.token_text import TokenBytes, written_text
from opd.types import FloatArray, IntArray, Prompt, Rollout, ScoredRollout, TeacherInfo

MOST_SPAN_TOKENS = 64
"""Longer spans, in tokens of the student, are not compared by a divergence: a chunk holds whole spans."""

FRONTS = ("\n", "a", "0", ")")
"""What a text is put behind, one character each: the first whose tokens do not merge with the text's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """A model's end tokens: all of them, that of plain text, and that of an assistant's turn."""

    stop_ids: Sequence[int]
    text: int
    turn: int


class TokenizerPair:
    """The tokenizers of student and teacher.

    ``first_space``: whether the teacher's tokenizer puts a space in front of a text (SentencePiece), which
    a completion, standing behind its prompt, must not get.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        student_ends: Ends,
        teacher_ends: Ends,
        first_space: bool,
    ) -> None:
        self.student, self.teacher = TokenBytes(student), TokenBytes(teacher)
        self.student_ends, self.teacher_ends = student_ends, teacher_ends
        self._tokenizers = (student, teacher)
        self._first_space = first_space

    def teacher_end(self, prompt: Prompt) -> int:
        """The token with which the teacher ends a completion of ``prompt``."""
        return self.teacher_ends.turn if prompt.is_chat else self.teacher_ends.text

    def align(self, rollout: Rollout) -> tuple[list[int], list[Span]]:
        """The teacher's ids of a completion, and their spans with the student's tokens.

        An end token of the student is the teacher's end token, a span of its own.
        """
        ids = rollout.token_ids.tolist()
        ended = ids[-1] in self.student_ends.stop_ids
        pieces = [self.student(index) for index in (ids[:-1] if ended else ids)]
        written = written_text(pieces, is_cut=not ended)
        teacher_ids, teacher_ends = self.encode(written.text)
        spans = align(written.ends, teacher_ends)
        if ended:
            own, other = len(pieces), len(teacher_ids)
            spans.append(Span(own, own + 1, other, other + 1))
            teacher_ids = [*teacher_ids, self.teacher_end(rollout.prompt)]
        return teacher_ids, spans

    def encode(self, text: str) -> tuple[list[int], list[int | None]]:
        """The teacher's ids of a text behind a prompt, and the byte of the text at which each ends.

        From the bytes of the tokens where these add up to the text, else (a normalizer, an unknown
        character) from the tokenizer's offsets, which divide between characters only.
        """
        if not text:
            return [], []
        ids, offsets = self._ids_and_offsets(text)
        raw = text.encode()
        pieces = [self.teacher(index) for index in ids]
        joined = b"".join(pieces)
        if joined == b" " + raw:
            pieces[0], joined = pieces[0][1:], raw
        if joined == raw:
            return ids, list(np.cumsum([len(piece) for piece in pieces]).tolist())
        if not offsets:  # a tokenizer without offsets: all tokens are one span
            return ids, [*[None] * (len(ids) - 1), len(raw)] if ids else []
        return ids, _offset_ends(text, offsets)

    def common(self, student_rows: int, teacher_rows: int) -> CommonVocabulary:
        """Tokens of the same text in both vocabularies, and the end tokens; ids below the heads' rows.

        Of several tokens with one text the first counts, added and <0x..> tokens last.
        """
        own, other = (
            _ids_by_text(*side)
            for side in zip(self._tokenizers, (self.student, self.teacher), strict=True)
        )
        pairs = {own[text]: other[text] for text in own.keys() & other.keys()}
        for mine, its in (
            (self.student_ends.text, self.teacher_ends.text),
            (self.student_ends.turn, self.teacher_ends.turn),
        ):
            pairs = {s: t for s, t in pairs.items() if s != mine and t != its} | {mine: its}
        ordered = sorted((s, t) for s, t in pairs.items() if s < student_rows and t < teacher_rows)
        plain = {self.student(s): m for m, (s, _) in enumerate(ordered) if self.student.is_text(s)}
        student_ids, teacher_ids = ([pair[side] for pair in ordered] for side in (0, 1))
        return CommonVocabulary(
            student_ids=np.array(student_ids, np.int32),
            teacher_ids=np.array(teacher_ids, np.int32),
            student_buckets=_buckets(self.student, student_rows, student_ids, plain),
            teacher_buckets=_buckets(self.teacher, teacher_rows, teacher_ids, plain),
        )

    def _ids_and_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if self._first_space:
            for front in FRONTS:
                front_ids, _ = self._encoded(front)
                ids, offsets = self._encoded(front + text)
                count = len(front_ids)
                if front_ids and ids[:count] == front_ids:
                    shifted = [(max(0, a - 1), max(0, b - 1)) for a, b in offsets[count:]]
                    return ids[count:], shifted
        return self._encoded(text)

    def _encoded(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        _, teacher = self._tokenizers
        encoded = teacher(
            text,
            add_special_tokens=False,
            return_offsets_mapping=teacher.is_fast,
            verbose=False,
        )
        ids = [int(index) for index in encoded["input_ids"]]
        return ids, list(encoded["offset_mapping"]) if teacher.is_fast else []


def _ids_by_text(tokenizer: Any, read: TokenBytes) -> dict[bytes, int]:
    """The first id of each text; added and <0x..> tokens come last."""
    plain: dict[bytes, int] = {}
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    late = {i for token, i in vocabulary.items() if token.startswith("<0x")}
    late |= set(tokenizer.added_tokens_decoder)
    for index in sorted(vocabulary.values(), key=lambda i: (i in late, i)):
        if text := read(index):
            plain.setdefault(text, index)
    return plain


def _buckets(
    read: TokenBytes, rows: int, common: Sequence[int], texts: Mapping[bytes, int]
) -> IntArray:
    """For each id its pair in ``common``, or that of the longest of ``texts`` that it begins with."""
    buckets = np.full(rows, len(common), np.int32)
    longest = max(map(len, texts), default=0)
    for index in range(rows):
        text = read(index) if read.is_text(index) else b""
        ends = range(min(longest, len(text)), 0, -1)
        buckets[index] = next((texts[text[:n]] for n in ends if text[:n] in texts), len(common))
    buckets[list(common)] = np.arange(len(common))
    return buckets


def _offset_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The byte at which each token ends, from offsets in characters; None where tokens share a character.

    Characters that no token has, such as the spaces that a WordPiece tokenizer drops, belong to the
    token behind them, and at the end to the last token.
    """
    sizes = np.cumsum([0, *(len(char.encode()) for char in text)])
    ends = np.maximum.accumulate([end for _, end in offsets])
    # a token of no text, for which tokenizers write (0, 0), stands where the one in front of it ends
    fronts = [0, *ends[:-1]]
    starts = np.array([a if a < b else at for (a, b), at in zip(offsets, fronts, strict=True)])
    ends[-1] = len(text)
    later = np.minimum.accumulate(starts[::-1])[::-1]
    divides = np.append(ends[:-1] <= later[1:], True)
    return [int(sizes[end]) if own else None for end, own in zip(ends, divides, strict=True)]


class OwnTokenizerTeacher:
    """Implements ``Teacher`` by another that scores its own tokens of the same text.

    ``Prompt.teacher_ids`` are the prompts in the teacher's tokens. Its log-probs are shared out over the
    student's tokens (``shared_logps``). With ``full``, the rows of its distribution stand at the last
    tokens of the spans (``SpanRows``), and ``head`` is that of its own vocabulary. What does
    not fit into the teacher's context is not scored.
    """

    def __init__(self, teacher: Teacher, pair: TokenizerPair, *, full: bool) -> None:
        self._teacher, self._pair, self._full = teacher, pair, full

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``."""
        aligned = [self._aligned(rollout) for rollout in rollouts]
        scored = self._teacher.score([read for read, _ in aligned])
        return [
            self._for_student(rollout, own, spans)
            for rollout, own, (_, spans) in zip(rollouts, scored, aligned, strict=True)
        ]

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._teacher.info()

    def head(self, name: str | None = None) -> FloatArray:
        """See ``Teacher``; rows of the teacher's own vocabulary."""
        return self._teacher.head(name)

    def _aligned(self, rollout: Rollout) -> tuple[Rollout, list[Span]]:
        """The rollout as the teacher reads it, and the spans that it scores."""
        assert rollout.prompt.teacher_ids is not None, (
            "prompts are read in the teacher's tokens too"
        )
        ids, spans = self._pair.align(rollout)
        room = self.info().max_length - len(rollout.teacher_prompt)
        spans = [
            span if span.teacher_end <= room else replace(span, teacher_start=0, teacher_end=0)
            for span in spans
        ]
        ids = ids[: max(span.teacher_end for span in spans)]
        # a request has at least one token to score
        token_ids = np.array(ids or [self._pair.teacher_end(rollout.prompt)], np.int32)
        read = replace(
            rollout,
            token_ids=token_ids,
            logps=np.zeros(len(token_ids), np.float32),
            support_ids=None,
        )
        return read, spans

    def _for_student(
        self, rollout: Rollout, own: ScoredRollout, spans: Sequence[Span]
    ) -> ScoredRollout:
        assert own.logps is not None, "a teacher returns the log-probs of the tokens"
        scored = ScoredRollout(rollout=rollout, logps=shared_logps(spans, own.logps, rollout.logps))
        if not self._full:
            return scored
        rows = span_rows(spans, own.rollout.token_ids, own.logps)
        last = [span for span in spans if rows.ids[span.student_end - 1] >= 0]
        return replace(
            scored,
            spans=rows,
            full_logps=_at_span_ends(own.full_logps, last, len(rollout.token_ids)),
            hidden=_at_span_ends(own.hidden, last, len(rollout.token_ids)),
        )


def span_rows(spans: Sequence[Span], teacher_ids: IntArray, teacher: FloatArray) -> SpanRows:
    """What a divergence reads of each token; ``teacher`` are the log-probs of ``teacher_ids``."""
    length = spans[-1].student_end
    rows = SpanRows(
        ids=np.full(length, -1, np.int32),
        targets=np.full(length, -1, np.int32),
        logps=np.zeros(length, np.float32),
        single=np.zeros(length, np.bool_),
    )
    for number, span in enumerate(spans):
        if span.teacher_tokens == 0 or span.student_tokens > MOST_SPAN_TOKENS:
            continue
        tokens, end = slice(span.student_start, span.student_end), span.student_end - 1
        rows.ids[tokens] = number
        rows.targets[end] = teacher_ids[span.teacher_end - 1]
        rows.logps[end] = teacher[span.teacher_start : span.teacher_end - 1].sum(dtype=np.float64)
        rows.single[end] = span.student_tokens == span.teacher_tokens == 1
    return rows


def _at_span_ends(rows: Any, spans: Sequence[Span], length: int) -> Any:
    """The teacher's row of the last token of each span, at the student's; zeros at other tokens."""
    if rows is None:
        return None
    placed = np.zeros((length, *rows.shape[1:]), rows.dtype)
    placed[[span.student_end - 1 for span in spans]] = rows[[s.teacher_end - 1 for s in spans]]
    return placed
