"""Chat options that change nothing, found by rendering the first prompts without them."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from opd.config.sources import DataSource
from opd.data.reading import PromptReader
from opd.data.source_rows import source_rows

INSPECTED_ROWS = 4
"""Rows of each source that are rendered with and without each option."""


def idle_options(sources: Sequence[DataSource], tokenizer: Any) -> list[str]:
    """The names in data.chat_options that change the text of no inspected prompt."""
    given, idle = set[str](), set[str]()
    for source in sources:
        reader = PromptReader.from_config(source.data, tokenizer)
        rows = list(islice(source_rows(source.path, source.data), INSPECTED_ROWS))
        for option in reader.chat_options:
            rest = {k: v for k, v in reader.chat_options.items() if k != option}
            bare = replace(reader, chat_options=rest)
            same = all(reader.read(*row).text == _text(bare, *row) for row in rows)
            (idle if same else given).add(option)
    return sorted(idle - given)


def _text(reader: PromptReader, place: str, row: Any) -> str | None:
    try:
        return reader.read(place, row).text
    except ValueError:  # a template may need the option
        return None
