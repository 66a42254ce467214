"""The rows of data sets become tokenised prompts; every row is checked, and an error names its place."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config.data import DataConfig
from opd.config.sources import data_sources
from opd.data.columns import column_names
from opd.data.completions import Completions
from opd.data.prompt_rows import RowReader
from opd.data.source_rows import NumberedRow, UniqueUids, numbered_rows
from opd.data.spool import SpooledPrompts
from opd.data.stream import PromptGroup
from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class RequiredAnswers:
    """Every prompt must have an answer, because ``who`` compares with it; ``setting`` names its column."""

    who: str
    setting: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedPrompts:
    """Prompts in the order of their sources.

    ``groups``: the prompts of each source and its share of a step; one group where no source has a
    weight. ``longest`` and ``teacher_longest``: the most tokens of a prompt, as the student and as the
    teacher sees it. ``notes``: what was left out, one sentence each.
    """

    prompts: Sequence[Prompt]
    groups: tuple[PromptGroup, ...]
    longest: int
    teacher_longest: int
    notes: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Found:
    """Rows of one kind: how many there are, and what the first one is."""

    count: int = 0
    first: str = ""

    def add(self, what: str) -> None:
        self.first = self.first or what
        self.count += 1


@dataclass(slots=True, kw_only=True)
class _Loading:
    """What is known of the rows that were read so far; ``kept`` counts the prompts of each source."""

    prompts: "list[Prompt] | SpooledPrompts"
    kept: list[int]
    rows: int = 0
    longest: int = 0
    teacher_longest: int = 0
    overlong: _Found = field(default_factory=_Found)
    unanswered: _Found = field(default_factory=_Found)

    def add(self, row: NumberedRow, prompt: Prompt, most: int | None, answer_field: str) -> None:
        """Keep a prompt, unless it has more than ``most`` tokens."""
        self.rows += 1
        length = len(prompt.token_ids)
        if most is not None and length > most:
            self.overlong.add(f"{row.place}: found a prompt of {length} tokens; allowed: {most}")
            return
        if prompt.answer is None:
            self.unanswered.add(
                f"{row.place}: found no answer in field {answer_field!r} (the fields are "
                f"{column_names(row.row)})"
            )
        seen = prompt.token_ids if prompt.teacher_ids is None else prompt.teacher_ids
        self.longest = max(self.longest, length)
        self.teacher_longest = max(self.teacher_longest, len(seen))
        self.kept[row.source] += 1
        self.prompts.append(prompt)


def load_prompts(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    data: DataConfig,
    *,
    setting: str = "data.train",
    max_prompt_tokens: int | None = None,
    completions: Completions | None = None,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
    answers: RequiredAnswers | None = None,
    keep_rows: bool = False,
) -> LoadedPrompts:
    """The prompts of ``source`` in the order of its rows; of each data set at most the first ``limit``.

    source: what ``setting`` holds: a path, a glob, a hub id, or a list of these.
    max_prompt_tokens: the most that the model takes; ``data.max_prompt_tokens`` may be less.
    completions: reads the completions of the data set into ``Prompt.completion_ids``.
    teacher_tokenizer: its chat template renders the teacher's prompts; by default the student's.

    Raises ``ValueError`` naming file, line, what was found and what is allowed: for unreadable rows,
    missing or empty prompts, wrong types, duplicate uids, prompts that are too long (unless
    ``data.filter_overlong_prompts`` drops them), and prompts without one of the ``answers`` that are
    required. Prompts are never truncated.
    """
    sources = data_sources(setting, source, data)
    loading = _Loading(prompts=SpooledPrompts() if data.streaming else [], kept=[0] * len(sources))
    readers = [
        RowReader.of_source(each.data, tokenizer, teacher_tokenizer, completions)
        for each in sources
    ]
    limits = [_least(max_prompt_tokens, each.data.max_prompt_tokens) for each in sources]
    uids = UniqueUids()
    for row in numbered_rows(sources):
        uids.add(row.uid)
        reader = readers[row.source]
        prompt = reader.read(row)
        prompt = replace(prompt, row=dict(row.row)) if keep_rows else prompt
        loading.add(row, prompt, limits[row.source], reader.data.answer_field)
    uids.require(lambda: numbered_rows(sources))
    notes = _require_short(setting, loading, filtered=data.filter_overlong_prompts)
    for each, kept in zip(sources, loading.kept, strict=True):
        if not kept:
            dropped = f" ({notes[0]})" if notes else ""
            raise ValueError(f"{each.path}: found no rows{dropped}; expected at least one prompt")
    if answers is not None and loading.unanswered.count:
        raise ValueError(
            f"{loading.unanswered.first}, the first of {loading.unanswered.count} of {loading.rows} rows "
            f"without one, and {answers.who} compares completions with it: name the right field with "
            f"{answers.setting}, or remove those rows"
        )
    return LoadedPrompts(
        prompts=loading.prompts,
        groups=tuple(
            PromptGroup(name=each.path, size=kept, weight=each.weight)
            for each, kept in zip(sources, loading.kept, strict=True)
        ),
        longest=loading.longest,
        teacher_longest=loading.teacher_longest,
        notes=notes,
    )


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _require_short(setting: str, loading: _Loading, *, filtered: bool) -> tuple[str, ...]:
    """What is said of the overlong prompts that were dropped; ValueError where they are refused."""
    overlong = loading.overlong
    if not overlong.count:
        return ()
    which = (
        f"{overlong.first}, the first of {overlong.count} of {loading.rows} rows that are longer"
    )
    if not filtered:
        raise ValueError(
            f"{which}; shorten or remove them, raise the limit, or drop them with "
            "data.filter_overlong_prompts=true"
        )
    return (
        f"{overlong.count} of the {loading.rows} prompts of {setting} are too long and are dropped; "
        f"the first at {overlong.first}",
    )
