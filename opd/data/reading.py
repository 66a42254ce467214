"""One row becomes one prompt: fields, template, chat template, token ids."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opd.config.data import DataConfig
from opd.data.chat import (
    SYSTEM_ROLES,
    Message,
    lost_roles,
    read_messages,
    read_tools,
    render_chat,
    split_answer,
)
from opd.data.chat_template import require_used, template_variables
from opd.data.columns import column, column_names, find_column, require_unicode, sequence
from opd.data.template import RowTemplate
from opd.types import IntArray

MESSAGES_AS_TEXT = re.compile(
    r"""\s*\[\s*\{\s*['"](?:(?:role|content|from)['"]\s*:"""
    r"""|\w+['"]\s*:.*['"](?:role|from)['"]\s*:\s*['"]\w+['"])""",
    re.DOTALL,
)
"""The start of a cell into which a list of messages was printed, as a .csv file has it."""
_OUR_OPTIONS = {
    "add_generation_prompt",
    "continue_final_message",
    "conversation",
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
}
"""Arguments of apply_chat_template that decide where a prompt ends and what is returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedPrompt:
    """A prompt as text and tokens.

    ``turns``: what the chat template rendered; None for plain text. ``options``: those that it was
    given. ``answer``: the assistant's turn that the row has behind the prompt; it is no part of the
    prompt. ``lost_roles``: whose turns the chat template does not render whole.
    """

    text: str
    token_ids: IntArray
    turns: list[Message] | None
    answer: Message | None
    options: Mapping[str, Any] = field(default_factory=dict)
    lost_roles: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReader:
    """Renders one row as text and tokenises it."""

    tokenizer: PreTrainedTokenizerBase
    prompt_field: str
    template: RowTemplate | None
    chat: bool
    chat_options: dict[str, Any] = field(default_factory=dict)
    options_setting: str | None = "data.chat_options"
    """Where the options were given for this reader; None: for another one, whose template they fit."""
    tools_field: str = "tools"
    system: str | None
    replaces_system: bool = False
    keeps_turns: bool = False
    """Messages stay messages where the template does not take the prompt: it fills their last turn."""

    @classmethod
    def from_config(cls, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> "PromptReader":
        """A reader of the student's prompts; ValueError for chat options that are not the user's."""
        _refuse_our_options("data.chat_options", data.chat_options)
        return cls(
            tokenizer=tokenizer,
            prompt_field=data.prompt_field,
            template=_template("data.template", data.template, data),
            chat=data.chat,
            chat_options=dict(data.chat_options),
            tools_field=data.tools_field,
            system=data.system,
        )

    def for_teacher(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase | None
    ) -> "PromptReader | None":
        """A reader of the teacher's prompts; None where teacher and student see the same prompt."""
        options = data.teacher_chat_options
        if not (data.teacher_template or data.teacher_system or tokenizer) and options is None:
            return None
        _refuse_our_options("data.teacher_chat_options", options or {})
        return replace(
            self,
            chat_options=self.chat_options if options is None else dict(options),
            options_setting=None if options is None else "data.teacher_chat_options",
            template=_template("data.teacher_template", data.teacher_template, data)
            or self.template,
            system=data.teacher_system or self.system,
            replaces_system=bool(data.teacher_system),
            keeps_turns=self.template is None or self.template.takes_prompt,
            tokenizer=tokenizer or self.tokenizer,
        )

    def read(self, place: str, row: Mapping[str, Any]) -> RenderedPrompt:
        """The prompt of ``row``. ValueError naming ``place`` for a row that cannot be used."""
        _refuse_media(place, row)
        text, turns, answer = self._content(place, row)
        lost: set[str] = set()
        options: dict[str, Any] = {}
        if turns is None:
            if self.system:
                name = "data.teacher_system" if self.replaces_system else "data.system"
                warnings.warn(f"{name} has no effect without data.chat=true", stacklevel=2)
        else:
            if self.options_setting is not None:
                require_used(self.options_setting, self.chat_options, self.tokenizer)
            options = self.chat_options | self._tools(place, row)
            turns = self._with_system(turns)
            text = render_chat(self.tokenizer, turns, options, place=place)
            lost = lost_roles(text, turns)
        require_unicode(place, "prompt", text)
        # The chat template writes the special tokens itself; the tokenizer must not add them again.
        ids = self.tokenizer(text, add_special_tokens=turns is None, verbose=False)["input_ids"]
        token_ids: IntArray = np.asarray(ids, dtype=np.int32)
        if len(token_ids) == 0:
            raise ValueError(f"{place}: the prompt {text[:60]!r} tokenises to nothing; remove it")
        return RenderedPrompt(
            text=text,
            token_ids=token_ids,
            turns=turns,
            answer=answer,
            options=options,
            lost_roles=frozenset(lost),
        )

    def _content(
        self, place: str, row: Mapping[str, Any]
    ) -> tuple[str, list[Message] | None, Message | None]:
        """(plain text, the turns of a conversation or None, the answer behind them or None)."""
        value = self._prompt(place, row)
        if (items := sequence(value)) is not None:
            turns, answer = split_answer(place, read_messages(place, items))
            if self.template is None:
                return "", turns, answer
            return "", [*turns[:-1], self._filled_turn(place, row, turns[-1])], answer
        text = value if self.template is None else self.template.fill(place, row, value)
        if not isinstance(text, str):
            kind = "null" if text is None else f"type {type(text).__name__}"
            raise ValueError(
                f"{place}: found a prompt of {kind}; expected a string or a list of "
                '{"role", "content"} messages'
            )
        if not text.strip():
            raise ValueError(f"{place}: the prompt is empty; write one or remove the row")
        for written in (value, text):
            if isinstance(written, str) and MESSAGES_AS_TEXT.match(written):
                raise ValueError(
                    f"{place}: found a list of messages written as text, {written[:60]!r}; save the "
                    "rows as .jsonl or .parquet, or read the text as messages with data.function (one "
                    "message with this text as its content, if the text itself is the prompt)"
                )
        return text, [{"role": "user", "content": text}] if self.chat else None, None

    def _filled_turn(self, place: str, row: Mapping[str, Any], last: Message) -> Message:
        """The last user's turn, with the template around it."""
        assert self.template is not None
        if last["role"] != "user":
            raise ValueError(
                f"{place}: found a {last['role']} turn last, and {self.template.setting} is put around "
                "a user's turn; leave the template out, or remove the row"
            )
        return last | {"content": self.template.fill(place, row, last["content"])}

    def _prompt(self, place: str, row: Mapping[str, Any]) -> Any:
        """The value of the prompt's column; None where a template is over other columns."""
        if self.template is not None and not self.template.takes_prompt:
            value = column(row, self.prompt_field) if self.keeps_turns else None
            return None if sequence(value) is None else value
        try:
            return find_column(row, self.prompt_field)
        except KeyError:
            if self.template is not None:
                return None
            raise ValueError(
                f"{place}: no field {self.prompt_field!r}; found {column_names(row)}; name the right "
                "one with data.prompt_field, or use data.template"
            ) from None

    def _tools(self, place: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """The tools of the row as an option of the chat template; none where the recipe gives them."""
        value = column(row, self.tools_field)
        used = "tools" in self.chat_options or (self.template and "{tools" in self.template.text)
        if used or not _filled(value):
            return {}
        known = template_variables(self.tokenizer.chat_template)
        if known is not None and "tools" not in known:
            raise ValueError(
                f"{place}: found tools in field {self.tools_field!r}, which the chat template does not use; "
                "write them into the system message, give another template with data.chat_template, or "
                "drop the field with data.function"
            )
        return {"tools": read_tools(place, self.tools_field, value)}

    def _with_system(self, turns: list[Message]) -> list[Message]:
        has_own = turns[0]["role"] in SYSTEM_ROLES
        if not self.system or (has_own and not self.replaces_system):
            return turns
        return [{"role": "system", "content": self.system}, *turns[has_own:]]


def _refuse_our_options(setting: str, options: Mapping[str, Any]) -> None:
    if ours := sorted(_OUR_OPTIONS & set(options)):
        raise ValueError(
            f"found {', '.join(ours)} in {setting}, which opd sets itself: a prompt ends where the answer "
            "begins; leave it out, and give variables of the chat template alone"
        )


def _refuse_media(place: str, row: Mapping[str, Any]) -> None:
    for name in ("images", "videos", "audios"):
        if _filled(row.get(name)):
            raise ValueError(
                f"{place}: found {name} in field {name!r}, and images and other media are not supported; "
                "remove the row, or drop the field with data.function"
            )


def _filled(value: Any) -> bool:
    """Whether a column holds a list that is not empty, a struct, or either as text."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null", "None")
    items = list(value.values()) if isinstance(value, Mapping) else sequence(value)
    return any(item is not None for item in items or [])


def _template(setting: str, text: str | None, data: DataConfig) -> RowTemplate | None:
    if not text:
        return None
    return RowTemplate(setting=setting, text=text, prompt_field=data.prompt_field)
