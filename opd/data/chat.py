"""Conversations: lists of messages, the chat template, and the end that it writes behind an answer."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from opd.data.columns import sequence

Message = dict[str, Any]

SYSTEM_ROLES = ("system", "developer")
_OTHER_NAMES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_MEDIA = ("image", "image_url", "video", "video_url", "audio", "input_audio")
"""Fields of a part that is not text."""
_ANSWER, _NEXT = "opd-answer-opd", "opd-question-opd"
"""An answer and the next question, which occur in no template."""


def read_messages(place: str, value: Sequence[Any]) -> list[Message]:
    """Checked messages: a role, and content as a string; ValueError names ``place`` and the message.

    Content in parts is joined when all parts are text, and keys without a value (parquet fills every
    struct with those of any other row) are left out at any depth.
    """
    return [_message(place, number, message) for number, message in enumerate(value, start=1)]


def _message(place: str, number: int, message: Any) -> Message:
    found = f"{place}: message {number} is {str(message)[:60]}"
    expected = 'expected {"role": "user", "content": "..."}'
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f"{found}; {expected}")
    role = message["role"]
    lowered = role.strip().lower()
    known = _OTHER_NAMES.get(lowered) or (
        lowered if lowered in (*SYSTEM_ROLES, "user", "assistant", "tool") else role
    )
    if role != known:
        raise ValueError(f"{found}; chat templates call the role {role!r} {known!r}: rename it")
    content = message.get("content")
    if (parts := sequence(content)) is not None:
        content = "".join(_part(found, part) for part in parts)
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise ValueError(f"{found}; {expected}")
    return _without_nulls(message) | {"content": content}


def _without_nulls(value: Any) -> Any:
    """``value`` without the null fields of its structs, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    items = sequence(value)
    return value if items is None else [_without_nulls(item) for item in items]


def _part(found: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    is_text = isinstance(part, Mapping) and isinstance(part.get("text"), str)
    if not is_text or part.get("type") not in (None, "text") or any(map(part.get, _MEDIA)):
        raise ValueError(
            f"{found}; expected parts of text, {{'type': 'text', 'text': '...'}}: images and other "
            "media are not supported"
        )
    return part["text"]


def read_tools(place: str, field: str, value: Any) -> list[dict[str, Any]]:
    """The tools of a row, a list of JSON schemas or that list as JSON text; ValueError otherwise."""
    try:
        items = sequence(json.loads(value) if isinstance(value, str) else value)
    except json.JSONDecodeError:
        items = None
    tools = [_without_nulls(item) for item in items or [] if isinstance(item, Mapping)]
    if items is None or len(tools) != len(items):
        raise ValueError(
            f"{place}: found tools {str(value)[:60]!r} in field {field!r}; expected a list of JSON schemas, "
            '[{"type": "function", "function": {"name": ...}}], or that list as JSON text'
        )
    return tools


def split_answer(place: str, messages: list[Message]) -> tuple[list[Message], Message | None]:
    """(the turns to answer, the assistant's turn behind them or None).

    ValueError naming ``place`` when nothing is left to answer: no turn, or the last one is a system
    message, another assistant's turn, or an empty user's turn.
    """
    has_answer = bool(messages) and messages[-1]["role"] == "assistant"
    turns, answer = (messages[:-1], messages[-1]) if has_answer else (messages, None)
    if not turns or (turns[-1]["role"] == "user" and not turns[-1]["content"].strip()):
        behind = " in front of the assistant's turn" if has_answer else ""
        raise ValueError(f"{place}: the prompt is empty{behind}; write one or remove the row")
    last = turns[-1]["role"]
    if last in (*SYSTEM_ROLES, "assistant"):
        found = "two assistant turns at the end" if last == "assistant" else f"a {last} turn last"
        raise ValueError(
            f"{place}: found {found} (turns: {_roles(messages)}); expected a prompt that ends with a "
            "user's turn, which one assistant's turn may follow; add the question or remove the row"
        )
    return turns, answer


def render_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    options: Mapping[str, Any],
    *,
    place: str,
    add_generation_prompt: bool = True,
) -> str:
    """The text that the tokenizer's chat template makes of ``messages``.

    Content goes to the template as strings; where it refuses these or loses the text of a system or
    user turn, as parts (an assistant's earlier reasoning may well be left out). ValueError with
    ``place`` and the template's own words when it has none or it refuses them.
    """
    name = repr(tokenizer.name_or_path)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{place}: the tokenizer {name} has no chat template; use plain strings with "
            "data.chat=false, or an instruct model"
        )

    def render(content: Callable[[str], Any]) -> str:
        given = [message | {"content": content(message["content"])} for message in messages]
        text = tokenizer.apply_chat_template(
            given, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
        assert isinstance(text, str)
        return text

    try:
        text = render(str)
        refusal = None
    except Exception as error:  # a template is a program and may raise anything
        text, refusal = "", error
    if refusal is None and not lost_roles(text, messages):
        return text
    with suppress(Exception):  # a template that takes strings alone
        in_parts = render(_parts)
        if not lost_roles(in_parts, messages) and not _prints_parts(in_parts, messages):
            return in_parts
    if refusal is None:
        return text
    words = " ".join(str(refusal).split()) or type(refusal).__name__
    raise ValueError(
        f"{place}: the chat template of {name} refuses the turns {_roles(messages)}: {words}; change "
        "the row, data.system, data.teacher_system or data.chat_options to what this template takes, "
        "or correct the template"
    ) from refusal


def _parts(content: str) -> list[dict[str, str]]:
    """Content as templates of vision models take it; of a string they may render nothing at all."""
    return [{"type": "text", "text": content}]


def _prints_parts(text: str, messages: Sequence[Message]) -> bool:
    """Whether a list of parts was printed into ``text``, as Python or as JSON."""
    marks = ("'type': 'text'", '"type": "text"', '"type":"text"')
    return any(
        text.count(mark) > sum(message["content"].count(mark) for message in messages)
        for mark in marks
    )


def lost_roles(text: str, messages: Sequence[Message]) -> set[str]:
    """The roles of the system and user turns whose content is not, or not whole, in ``text``."""
    return {
        message["role"]
        for message in messages
        if message["role"] in (*SYSTEM_ROLES, "user") and message["content"].strip() not in text
    }


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def end_of_turn(tokenizer: Any, stop_ids: Sequence[int]) -> int | None:
    """The token that the chat template writes behind an answer, or None where it writes none.

    That is the first of ``stop_ids`` that stands behind every answer (Command-A writes its
    <|END_RESPONSE|> in front of it); else the first special token behind the last answer (Phi-3 writes
    its eos there alone, and <|end|> in front of it); where a template writes nothing there, the first
    of ``stop_ids`` between the answer and the next user's turn (GLM's <|user|>).
    ValueError when the template cannot render an answer.
    """
    if tokenizer.chat_template is None:
        return None
    question = {"role": "user", "content": "question"}
    pair = [question, {"role": "assistant", "content": _ANSWER}]
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
    openers = {tokenizer.bos_token_id, tokenizer.unk_token_id} - {tokenizer.eos_token_id}
    last = _behind_answer(tokenizer, pair)
    try:
        between = _behind_answer(tokenizer, [*pair, question | {"content": _NEXT}])
    except ValueError:
        between = []
    declared = set(stop_ids)
    ends = [
        *(i for i in last if i in declared and i in between),
        *(i for i in last if i in declared or i in special - openers),
        *(i for i in between if i in declared),
    ]
    return next(iter(ends), None)


def _behind_answer(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of what the template writes behind the answer, up to the next question if there is one."""
    place = "a question and its answer"
    text = render_chat(tokenizer, messages, {}, place=place, add_generation_prompt=False)
    _, _, behind = text.rpartition(_ANSWER)
    behind = behind.partition(_NEXT)[0] if _ANSWER in text else ""
    return tokenizer(behind, add_special_tokens=False, verbose=False)["input_ids"]
