"""Rows become tokenised prompts; every row is checked, and an error names the file and line."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config.data import DataConfig
from opd.config.functions import load_function
from opd.data.answer_turns import answer_text, thinking_fits
from opd.data.columns import column_names, compile_regex, read_answer, read_teacher, read_uid
from opd.data.completions import Completions
from opd.data.reading import PromptReader, RenderedPrompt
from opd.data.rows import Row, read_rows
from opd.types import Prompt

OTHER_CONTINUATION = (
    "the chat template does not write the assistant's turn behind the prompt as it is (it leaves out "
    "reasoning or a tool call, or begins an answer otherwise than the prompt ends), and the turn's content "
    "is learned behind the prompt; see that a <think> block is opened and closed once, for example with "
    "data.chat_options"
)
THINKING = (
    "the completion does not fit the tags that the prompt ends with: it begins with them again, never "
    "closes the <think> that they open, or opens one behind </think>; correct the completions, or set "
    "data.chat_options"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredAnswers:
    """Every prompt must have an answer, because ``who`` compares with it; ``setting`` names its column."""

    who: str
    setting: str


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    max_prompt_tokens: int | None = None,
    completions: Completions | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    answers: RequiredAnswers | None = None,
) -> list[Prompt]:
    """The prompts of ``source`` in file order, at most the first ``data.limit``.

    source: a .jsonl, .jsonl.gz, .json, .csv or .parquet path, or a hub id.
    completions: reads the completions of the data set into ``Prompt.completion_ids``.
    teacher_tokenizer: its chat template renders the teacher's prompts; by default the student's.
    uid: the row's ``uid`` when it has one, else its number in the source.

    Raises ``ValueError`` naming file, line, what was found and what is allowed: for unreadable
    rows, missing or empty prompts, wrong types, duplicate uids, prompts of more than
    ``max_prompt_tokens`` tokens, and prompts without one of the ``answers`` that are required.
    Prompts are never truncated or dropped silently.
    """
    reader = PromptReader.from_config(data, tokenizer, max_prompt_tokens)
    teacher_reader = reader.for_teacher(data, teacher_tokenizer)
    answer_regex = compile_regex(data.answer_regex)
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    unanswered: list[tuple[str, str]] = []
    for index, (place, row) in enumerate(source_rows(source, data)):
        rendered = reader.read(place, row)
        uid = read_uid(place, row, index)
        if uid in first_seen:
            raise ValueError(
                f"{place}: found uid {uid!r} again, first at {first_seen[uid]}; "
                "make each uid unique, or leave uid out"
            )
        first_seen[uid] = place
        prompt = Prompt(
            uid=uid,
            token_ids=rendered.token_ids,
            answer=read_answer(place, row, data.answer_field, answer_regex),
            text=rendered.text,
            is_chat=rendered.turns is not None,
            has_answer_turn=rendered.answer is not None,
            remarks=_lost_turns(rendered, "student"),
        )
        if prompt.answer is None:
            unanswered.append((place, column_names(row)))
        if data.teacher_field is not None:
            prompt = replace(prompt, teacher=read_teacher(place, row, data.teacher_field))
        if completions is not None:
            prompt = _with_completion(prompt, completions, reader, rendered, place, row)
        if teacher_reader is not None:
            prompt = _with_teacher(prompt, teacher_reader.read(place, row))
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source}: found no rows; expected at least one prompt")
    if answers is not None and unanswered:
        raise ValueError(_without_answers(unanswered, len(prompts), data.answer_field, answers))
    return prompts


def _without_answers(
    rows: Sequence[tuple[str, str]], total: int, field: str, answers: RequiredAnswers
) -> str:
    """The message for ``rows``, (place, columns) of those that have no answer."""
    place, names = rows[0]
    return (
        f"{place}: found no answer in field {field!r} (the fields are {names}), the first of {len(rows)} "
        f"of {total} rows without one, and {answers.who} compares completions with it: name the right "
        f"field with {answers.setting}, or remove those rows"
    )


def _lost_turns(rendered: RenderedPrompt, reader: str) -> tuple[str, ...]:
    return tuple(
        f"the chat template leaves out the text of a {role} turn, or a part of it, so that the {reader} "
        "does not see it; put it into the user's turn, or use another chat template"
        for role in sorted(rendered.lost_roles)
    )


def _with_teacher(prompt: Prompt, seen: RenderedPrompt) -> Prompt:
    remarks = (*prompt.remarks, *_lost_turns(seen, "teacher"))
    return replace(prompt, teacher_ids=seen.token_ids, remarks=remarks)


def _with_completion(
    prompt: Prompt,
    completions: Completions,
    reader: PromptReader,
    rendered: RenderedPrompt,
    place: str,
    row: Mapping[str, Any],
) -> Prompt:
    found = rendered.answer if completions.field is None else completions.read_column(place, row)
    if found is None:
        raise ValueError(
            f"{place}: found no completion: data.completion_field is not set, and the prompt is not a "
            "list of messages that ends with the assistant's turn; name the column of completions "
            "with data.completion_field (`opd generate` makes such a file)"
        )
    if isinstance(found, str):
        text = found
        remark = None if rendered.turns is None or thinking_fits(rendered.text, text) else THINKING
    else:
        text, fits = answer_text(place, reader, rendered, found)
        remark = None if fits else OTHER_CONTINUATION
    end_id = completions.end_id if rendered.turns is None else completions.turn_end_id
    return replace(
        prompt,
        completion_ids=completions.encode(place, text, end_id, rendered),
        remarks=prompt.remarks if remark is None else (*prompt.remarks, remark),
    )


def source_rows(source: str, data: DataConfig) -> Iterator[Row]:
    """(place, row) of the rows that ``data`` selects, each converted by ``data.function`` if it is set."""
    rows = read_rows(source, split=data.split, subset=data.subset)
    if data.function is not None:
        rows = _converted(rows, data.function)
    return islice(rows, data.limit)


def _converted(rows: Iterator[Row], name: str) -> Iterator[Row]:
    convert = load_function("data.function", name)
    for place, row in rows:
        try:
            converted: Any = convert(dict(row))
        except Exception as error:  # the user's code may raise anything
            raise ValueError(
                f"{place}: data.function={name} failed ({type(error).__name__}: {error}); correct the "
                "function or the row"
            ) from error
        if converted is None:
            continue
        if not isinstance(converted, Mapping):
            raise ValueError(
                f"{place}: data.function={name} returned a {type(converted).__name__}; expected a dict "
                "(the row to use) or None (drop it)"
            )
        yield place, converted
