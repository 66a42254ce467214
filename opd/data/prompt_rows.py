"""One row of a source becomes one prompt: what the student sees, what the teacher sees, the answer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from opd.config.data import DataConfig
from opd.data.answer_turns import answer_text, thinking_fits
from opd.data.columns import compile_regex, read_answer, read_teacher
from opd.data.completions import Completions
from opd.data.reading import PromptReader, RenderedPrompt
from opd.data.source_rows import NumberedRow
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
class RowReader:
    """Reads the rows of one source with its settings ``data``."""

    data: DataConfig
    student: PromptReader
    teacher: PromptReader | None
    answer_regex: re.Pattern[str] | None
    completions: Completions | None

    @classmethod
    def of_source(
        cls,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase | None,
        completions: Completions | None,
    ) -> "RowReader":
        """A reader for the settings of one source; ValueError for settings that cannot be used."""
        student = PromptReader.from_config(data, tokenizer)
        if completions is not None and data.completion_field is not None:
            completions = replace(completions, field=data.completion_field)
        return cls(
            data=data,
            student=student,
            teacher=student.for_teacher(data, teacher_tokenizer),
            answer_regex=compile_regex(data.answer_regex),
            completions=completions,
        )

    def read(self, numbered: NumberedRow) -> Prompt:
        """The prompt of a row. ValueError naming its place when it cannot be used."""
        place, row = numbered.place, numbered.row
        rendered = self.student.read(place, row)
        prompt = Prompt(
            uid=numbered.uid,
            token_ids=rendered.token_ids,
            answer=read_answer(place, row, self.data.answer_field, self.answer_regex),
            text=rendered.text,
            is_chat=rendered.turns is not None,
            has_answer_turn=rendered.answer is not None,
            remarks=_lost_turns(rendered, "student"),
        )
        if self.data.teacher_field is not None:
            prompt = replace(prompt, teacher=read_teacher(place, row, self.data.teacher_field))
        if self.completions is not None:
            prompt = self._with_completion(prompt, self.completions, rendered, place, row)
        if self.teacher is not None:
            seen = self.teacher.read(place, row)
            remarks = (*prompt.remarks, *_lost_turns(seen, "teacher"))
            prompt = replace(prompt, teacher_ids=seen.token_ids, remarks=remarks)
        return prompt

    def _with_completion(
        self,
        prompt: Prompt,
        completions: Completions,
        rendered: RenderedPrompt,
        place: str,
        row: Mapping[str, Any],
    ) -> Prompt:
        column = completions.field
        found = rendered.answer if column is None else completions.read_column(place, row)
        if found is None:
            raise ValueError(
                f"{place}: found no completion: data.completion_field is not set, and the prompt is not "
                "a list of messages that ends with the assistant's turn; name the column of completions "
                "with data.completion_field (`opd generate` makes such a file)"
            )
        if isinstance(found, str):
            text = found
            fits = rendered.turns is None or thinking_fits(rendered.text, text)
            remark = None if fits else THINKING
        else:
            text, fits = answer_text(place, self.student, rendered, found)
            remark = None if fits else OTHER_CONTINUATION
        end_id = completions.end_id if rendered.turns is None else completions.turn_end_id
        return replace(
            prompt,
            completion_ids=completions.encode(place, text, end_id, rendered),
            remarks=prompt.remarks if remark is None else (*prompt.remarks, remark),
        )


def _lost_turns(rendered: RenderedPrompt, reader: str) -> tuple[str, ...]:
    return tuple(
        f"the chat template leaves out the text of a {role} turn, or a part of it, so that the {reader} "
        "does not see it; put it into the user's turn, or use another chat template"
        for role in sorted(rendered.lost_roles)
    )
