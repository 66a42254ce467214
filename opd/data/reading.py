"""One row becomes one prompt: fields, template, chat template, token ids."""

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
    """Reads the completions of a data set: the text in ``field``, tokenised, plus the end token.

    A completion of more than ``max_tokens`` tokens, end token included, is refused.
    """

    field: str
    tokenizer: PreTrainedTokenizerBase
    end_id: int
    max_tokens: int

    def read(self, place: str, row: Mapping[str, Any]) -> IntArray:
        """Token ids [T] of one row; ValueError naming the row when it has no completion."""
        text = row.get(self.field)
        if not isinstance(text, str) or not text:
            raise ValueError(
                f"{place}: found {'no' if text is None else 'an unusable'} completion in field "
                f"{self.field!r}; found the fields {_names(row)}; expected a non-empty string, as "
                "`opd generate` writes"
            )
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        token_ids = np.asarray([*ids, self.end_id], np.int32)
        if len(token_ids) > self.max_tokens:
            raise ValueError(
                f"{place}: found a completion of {len(token_ids)} tokens; allowed: "
                f"rollout.max_tokens={self.max_tokens}; shorten or remove it, or raise the limit"
            )
        return token_ids


def teacher_name(place: str, row: Mapping[str, Any], field: str) -> str:
    """The teacher that ``row`` names in ``field``; ValueError when it names none."""
    name = row.get(field)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{place}: found {name!r} in field {field!r}; expected the name of a teacher, one of "
            "teacher.members"
        )
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """Renders one row as text and tokenises it."""

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
        """A reader of the student's prompts; ValueError for an invalid ``answer_regex``."""
        return cls(
            tokenizer=tokenizer,
            prompt_field=data.prompt_field,
            answer_field=data.answer_field,
            answer_regex=_compile(data.answer_regex),
            template=data.template,
            chat_template=data.chat,
            chat_options=dict(data.chat_options),
            system=data.system,
            max_prompt_tokens=max_prompt_tokens,
        )

    def for_teacher(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> "PromptReader | None":
        """A reader of the teacher's prompts; None where teacher and student see the same prompt."""
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
        """The prompt of ``row``; ``index`` is its uid where the row has none.

        ValueError naming ``place`` for a row that cannot be used.
        """
        if self.template is not None:
            content: str | list[dict[str, Any]] = self._fill_template(place, row)
        else:
            content = self._read_content(place, row)
        text, templated = self._render(place, content)
        # The chat template writes the special tokens itself; the tokenizer must not add them again.
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
            answer=self._read_answer(place, row),
            text=text,
        )

    def _fill_template(self, place: str, row: Mapping[str, Any]) -> str:
        assert self.template is not None
        try:
            named = {"prompt": row[self.prompt_field]} if self.prompt_field in row else {}
            return string.Formatter().vformat(self.template, (), {**row, **named})
        except (KeyError, IndexError) as error:
            raise ValueError(
                f"{place}: the template needs the field {error}; found the fields {_names(row)}; "
                "double literal braces: {{ }}"
            ) from error
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"data.template={self.template!r} cannot be filled ({error}); write fields as {{name}} "
                "and double literal braces: {{ }}"
            ) from error

    def _read_content(self, place: str, row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
        if self.prompt_field not in row:
            raise ValueError(
                f"{place}: no field {self.prompt_field!r}; found {_names(row)}; name the right one "
                "with data.prompt_field, or use data.template"
            )
        content = row[self.prompt_field]
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise ValueError(
                f"{place}: found a prompt of type {type(content).__name__}; expected a string or a "
                'list of {"role", "content"} messages'
            )
        return [_message(place, number, message) for number, message in enumerate(content, start=1)]

    def _render(self, place: str, content: str | list[dict[str, Any]]) -> tuple[str, bool]:
        """The prompt's text, and whether the chat template rendered it."""
        if not (content.strip() if isinstance(content, str) else content):
            raise ValueError(f"{place}: the prompt is empty; write one or remove the row")
        if isinstance(content, list):
            messages = content
        elif self.chat_template:
            messages = [{"role": "user", "content": content}]
        else:
            if self.system:
                warnings.warn("data.system has no effect without data.chat=true", stacklevel=2)
            return content, False
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"{place}: the tokenizer {self.tokenizer.name_or_path!r} has no chat template; "
                "use plain strings with data.chat=false, or an instruct model"
            )
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **self.chat_options
        )
        assert isinstance(text, str)
        return text, True

    def _read_answer(self, place: str, row: Mapping[str, Any]) -> str | None:
        value = row.get(self.answer_field)
        if value is None:
            return None
        parts = value if isinstance(value, list) else [value]
        if not parts or not all(isinstance(part, str | int | float) for part in parts):
            raise ValueError(
                f"{place}: found an answer of type {type(value).__name__} ({str(value)[:60]!r}); "
                "expected a string, a number, a boolean or a list of these"
            )
        answer = "|".join(str(part) for part in parts)
        if self.answer_regex is None:
            return answer
        match = self.answer_regex.search(answer)
        if match is None:
            raise ValueError(
                f"{place}: data.answer_regex={self.answer_regex.pattern!r} finds nothing in "
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


def _compile(answer_regex: str | None) -> re.Pattern[str] | None:
    try:
        return None if answer_regex is None else re.compile(answer_regex)
    except re.error as error:
        raise ValueError(
            f"data.answer_regex={answer_regex!r} is not a regular expression ({error})"
        ) from error
