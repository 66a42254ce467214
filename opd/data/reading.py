"""How one row becomes one prompt: fields, templates, chat templates, tokens."""

import re
import string
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opd.config.data import DataConfig
from opd.types import IntArray, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """The completions of a data set: the text in ``field``, tokenised, and the token that ends it.

    Longer than ``max_tokens``, end included, is refused.
    """

    field: str
    tokenizer: PreTrainedTokenizerBase
    end_id: int
    max_tokens: int

    def read(self, place: str, row: Mapping[str, Any]) -> IntArray:
        """Token ids [T] of one row; ValueError naming it when there is none."""
        said = row.get(self.field)
        if not isinstance(said, str) or not said:
            raise ValueError(
                f"{place}: found {'no' if said is None else 'an unusable'} completion in field "
                f"{self.field!r}; found the fields {_names(row)}; expected a non-empty string, as "
                "`opd write` leaves them"
            )
        ids = self.tokenizer(said, add_special_tokens=False, verbose=False)["input_ids"]
        token_ids = np.asarray([*ids, self.end_id], np.int32)
        if len(token_ids) > self.max_tokens:
            raise ValueError(
                f"{place}: found a completion of {len(token_ids)} tokens; allowed: "
                f"rollout.max_tokens={self.max_tokens}; shorten or remove it, or raise the limit"
            )
        return token_ids


def teacher_name(place: str, row: Mapping[str, Any], field: str) -> str:
    named = row.get(field)
    if not isinstance(named, str) or not named:
        raise ValueError(
            f"{place}: found {named!r} in field {field!r}; expected the name of a teacher, one of "
            "teacher.members"
        )
    return named


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """How one row becomes one prompt."""

    tokenizer: PreTrainedTokenizerBase
    prompt_field: str
    answer_field: str
    answer_regex: re.Pattern[str] | None
    template: str | None
    chat_template: bool
    chat_options: dict[str, Any] = field(default_factory=dict)
    system: str | None
    max_prompt_tokens: int | None

    @classmethod
    def from_config(
        cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int | None
    ) -> "PromptReader":
        """The student's prompts; ValueError for an ``answer_regex`` that is none."""
        return cls(
            tokenizer=tokenizer,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            answer_regex=_compiled(data.answer_regex),
            template=data.template,
            chat_template=data.chat,
            chat_options=dict(data.chat_options),
            system=data.system,
            max_prompt_tokens=max_prompt_tokens,
        )

    def for_teacher(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> "PromptReader | None":
        """The teacher's prompts of the same rows; None where it sees what the student sees."""
        if not (data.teacher_template or data.teacher_system or tokenizer):
            return None
        return replace(
            self,
            template=data.teacher_template or self.template,
            system=data.teacher_system or self.system,
            tokenizer=tokenizer or self.tokenizer,
            max_prompt_tokens=None,
        )

    def prompt(self, place: str, row: Mapping[str, Any], index: int) -> Prompt:
        said = self._filled(place, row) if self.template is not None else self._said(place, row)
        text, templated = self._rendered(place, said)
        # The chat template writes the special tokens itself; twice would be once too many.
        ids = self.tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]
        token_ids: IntArray = np.asarray(ids, dtype=np.int32)
        if len(token_ids) == 0:
            raise ValueError(f"{place}: the prompt {text[:60]!r} tokenises to nothing; remove it")
        if self.max_prompt_tokens is not None and len(token_ids) > self.max_prompt_tokens:
            raise ValueError(
                f"{place}: found a prompt of {len(token_ids)} tokens; allowed: "
                f"{self.max_prompt_tokens}; shorten or remove it, or raise the limit"
            )
        return Prompt(
            uid=_uid(place, row, index),
            token_ids=token_ids,
            answer=self._answer(place, row),
            text=text,
        )

    def _filled(self, place: str, row: Mapping[str, Any]) -> str:
        assert self.template is not None
        try:
            named = {"prompt": row[self.prompt_field]} if self.prompt_field in row else {}
            return string.Formatter().vformat(self.template, (), {**row, **named})
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{place}: the template asks for {error}; found the fields {_names(row)}; "
                "double literal braces: {{ }}"
            ) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"template={self.template!r} cannot be filled ({error}); write fields as {{name}} "
                "and double literal braces: {{ }}"
            ) from error

    def _said(self, place: str, row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        if self.prompt_field not in row:
            raise ValueError(
                f"{place}: no field {self.prompt_field!r}; found {_names(row)}; name the right one "
                "with prompt_field, or use a template"
            )
        said = row[self.prompt_field]
        if isinstance(said, str):
            return said
        if not isinstance(said, list):
            raise ValueError(
                f"{place}: found a prompt of type {type(said).__name__}; expected a string or a "
                'list of {"role", "content"} messages'
            )
        return [_message(place, number, message) for number, message in enumerate(said, start=1)]

    def _rendered(self, place: str, said: str | list[dict[str, Any]]) -> tuple[str, bool]:
        """The prompt's text, and whether the chat template wrote it."""
        if not (said.strip() if isinstance(said, str) else said):
            raise ValueError(f"{place}: the prompt is empty; write one or remove the row")
        if isinstance(said, str):
            if not self.chat_template:
                if self.system:
                    warnings.warn("system has no effect without chat_template", stacklevel=2)
                return said, False
            said = [{"role": "user", "content": said}]
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{place}: the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "give plain strings without chat_template, or use an instruct model"
            )
        if self.system and said[0]["role"] != "system":
            said = [{"role": "system", "content": self.system}, *said]
        text = self.tokenizer.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True, **self.chat_options
        )
        assert isinstance(text, str)
        return text, True

    def _answer(self, place: str, row: Mapping[str, Any]) -> str | None:
        said = row.get(self.answer_field)
        if said is None:
            return None
        parts = said if isinstance(said, list) else [said]
        if not parts or not all(isinstance(part, str | int | float) for part in parts):
            raise ValueError(
                f"{place}: found an answer of type {type(said).__name__} ({str(said)[:60]!r}); "
                "expected a string, a number, a boolean or a list of these"
            )
        answer = "|".join(str(part) for part in parts)
        if self.answer_regex is None:
            return answer
        match = self.answer_regex.search(answer)
        if match is None:
            raise ValueError(
                f"{place}: answer_regex={self.answer_regex.pattern!r} finds nothing in "
                f"{answer[-60:]!r}; correct the expression or the row"
            )
        return (match.group(1) if self.answer_regex.groups else match.group()).strip()


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "none"


def _uid(place: str, row: Mapping[str, Any], index: int) -> str:
    uid = row.get("uid")
    if uid is None:
        return str(index)
    if not isinstance(uid, str | int) or isinstance(uid, bool) or not str(uid):
        raise ValueError(f"{place}: found uid {uid!r}; expected a non-empty string or an integer")
    return str(uid)


def _message(place: str, number: int, message: Any) -> dict[str, Any]:
    if (
        not isinstance(message, dict)
        or not isinstance(message.get("role"), str)
        or not isinstance(message.get("content"), str)
    ):
        raise ValueError(
            f"{place}: message {number} is {str(message)[:60]}; expected "
            '{"role": "user", "content": "..."}'
        )
    return message


def _compiled(answer_regex: str | None) -> re.Pattern[str] | None:
    try:
        return None if answer_regex is None else re.compile(answer_regex)
    except re.error as error:
        raise ValueError(
            f"answer_regex={answer_regex!r} is not a regular expression ({error})"
        ) from error
