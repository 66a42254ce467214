"""Rows become tokenised prompts; every row is checked, and an error names the file and line."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config.data import DataConfig
from opd.config.functions import load_function
from opd.data.reading import Completions, PromptReader, teacher_name
from opd.data.rows import Row, read_rows
from opd.types import Prompt


def load_prompts(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    max_prompt_tokens: int | None = None,
    completions: Completions | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Prompt]:
    """The prompts of ``source`` in file order, at most the first ``data.limit``.

    source: a .jsonl, .jsonl.gz, .json, .csv or .parquet path, or a hub id.
    completions: reads the completions of the data set into ``Prompt.completion_ids``.
    teacher_tokenizer: its chat template renders the teacher's prompts; by default the student's.
    uid: the row's ``uid`` when it has one, else its number in the source.

    Raises ``ValueError`` naming file, line, what was found and what is allowed: for unreadable
    rows, missing or empty prompts, wrong types, duplicate uids and prompts of more than
    ``max_prompt_tokens`` tokens. Prompts are never truncated or dropped silently.
    """
    reader = PromptReader.from_config(data, tokenizer, max_prompt_tokens)
    teacher_reader = reader.for_teacher(data, teacher_tokenizer)
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for index, (place, row) in enumerate(source_rows(source, data)):
        prompt = reader.prompt(place, row, index)
        if prompt.uid in first_seen:
            raise ValueError(
                f"{place}: found uid {prompt.uid!r} again, first at {first_seen[prompt.uid]}; "
                "make each uid unique, or leave uid out"
            )
        first_seen[prompt.uid] = place
        if data.teacher_field is not None:
            prompt = replace(prompt, teacher=teacher_name(place, row, data.teacher_field))
        if completions is not None:
            prompt = replace(prompt, completion_ids=completions.read(place, row))
        if teacher_reader is not None:
            teacher_prompt = teacher_reader.prompt(place, row, index)
            prompt = replace(prompt, teacher_ids=teacher_prompt.token_ids)
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{source}: found no rows; expected at least one prompt")
    return prompts


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
