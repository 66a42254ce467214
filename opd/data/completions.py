"""Completions of a data set: their text, tokenised, with one end token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opd.data.chat import Message, read_messages
from opd.data.columns import column, column_names, require_unicode, sequence
from opd.data.reading import RenderedPrompt
from opd.data.tokenizer import StudentTokenizer, adds_first_space
from opd.types import IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Reads the completions in the column ``field``; None: the assistant's turns behind the prompts.

    A completion ends with ``turn_end_id`` behind a prompt that the chat template rendered and with
    ``end_id`` behind plain text. One whose text ends with such a token, or another of ``stop_ids``,
    gets no second one. A completion of more than ``max_tokens`` tokens, end included, is refused.
    """

    field: str | None
    tokenizer: PreTrainedTokenizerBase
    end_id: int
    turn_end_id: int
    stop_ids: Sequence[int]
    max_tokens: int

    @classmethod
    def of_student(
        cls, student: StudentTokenizer, *, field: str | None, max_tokens: int
    ) -> "Completions":
        """Completions that end as the student's do."""
        return cls(
            field=field,
            tokenizer=student.tokenizer,
            end_id=student.end_id,
            turn_end_id=student.turn_end_id,
            stop_ids=student.stop_ids,
            max_tokens=max_tokens,
        )

    def read_column(self, place: str, row: Mapping[str, Any]) -> str | Message:
        """The completion: a string, or one message of the assistant.

        ValueError naming the row when it has no completion.
        """
        assert self.field is not None
        value = column(row, self.field)
        items = sequence(value)
        if items:
            messages = read_messages(place, items)
            if [message["role"] for message in messages] == ["assistant"]:
                return messages[0]
        if not isinstance(value, str) or not value:
            raise ValueError(
                f"{place}: found {'no' if value is None else 'an unusable'} completion in field "
                f"{self.field!r}; found the fields {column_names(row)}; expected a non-empty string, "
                "as `opd generate` writes, or a list of one assistant's message"
            )
        return value

    def encode(
        self, place: str, text: str, end_id: int, prompt: RenderedPrompt | None = None
    ) -> IntArray:
        """Token ids [T] of a completion, with ``end_id`` at its end unless it has an end already.

        They are those that the text has behind ``prompt``; by default behind another line.
        """
        require_unicode(place, "completion", text)
        body, own_end = self._without_end(text, end_id)
        if not body:
            raise ValueError(
                f"{place}: found the completion {text[:60]!r}, which is nothing but its end; write one "
                "or remove the row"
            )
        ids = self._ids_behind(body, prompt)
        token_ids = np.asarray([*ids, end_id if own_end is None else own_end], np.int32)
        if len(token_ids) > self.max_tokens:
            raise ValueError(
                f"{place}: found a completion of {len(token_ids)} tokens; allowed: "
                f"rollout.max_tokens={self.max_tokens}; shorten or remove it, or raise the limit"
            )
        return token_ids

    def _ids_behind(self, body: str, prompt: RenderedPrompt | None) -> list[int]:
        alone = self._ids(body)
        if not adds_first_space(self.tokenizer):
            return alone
        # SentencePiece puts a space in front of a text, and a completion is not where a text begins.
        if prompt is not None:
            start = prompt.token_ids.tolist()
            joint = self._ids(prompt.text + body, add_special_tokens=prompt.turns is None)
            if joint[: len(start)] == start and len(joint) > len(start):
                return joint[len(start) :]
        line, behind = self._ids("\n"), self._ids(f"\n{body}")
        return behind[len(line) :] if behind[: len(line)] == line else alone

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return encoded["input_ids"]

    def _without_end(self, text: str, end_id: int) -> tuple[str, int | None]:
        """(the text in front of its end tokens, the first of these or None).

        White space between or behind end tokens, which templates write, is dropped with them.
        """
        ends = {
            str(self.tokenizer.convert_ids_to_tokens(i)): i
            for i in (*self.stop_ids, self.end_id, self.turn_end_id, end_id)
        }
        body, own_end, end = text, None, _end_in(text, ends)
        while end is not None:
            stripped = body if body.endswith(end) else body.rstrip()
            body, own_end = stripped.removesuffix(end), ends[end]
            end = _end_in(body, ends)
        return body, own_end


def _end_in(text: str, ends: Mapping[str, int]) -> str | None:
    """The end token that ``text`` ends with, white space aside; the longest of several."""
    stripped = text.rstrip()
    found = [end for end in ends if end and (text.endswith(end) or stripped.endswith(end))]
    return max(found, key=len, default=None)
