"""``data``: the prompts for training and for evaluation."""

from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from opd.config.fields import bounded


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Training prompts and held-out prompts."""

    train: Any = MISSING
    """Training prompts: a file, a glob, a folder of save_to_disk, a hub data set id, or a list of these."""
    eval: Any = None
    """Held-out prompts with answers, of the same kinds; without them nothing is evaluated."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of data.train when it is a hub data set or a folder of save_to_disk."""
    revision: str | None = None
    """Branch, tag or commit of data.train when it is a hub data set."""
    eval_subset: str | None = None
    """Configuration name of data.eval; by default data.subset."""
    eval_split: str = "test"
    """Split of data.eval when it is a hub data set or a folder of save_to_disk."""
    eval_revision: str | None = None
    """Branch, tag or commit of data.eval; by default data.revision where data.eval is data.train."""
    streaming: bool = False
    """Keep the prompts in a temporary file and read rows one by one: memory does not grow with the data."""
    function: str | None = None
    """path.py:name or module:name of a function from a row (dict) to the row to use; None drops it."""
    prompt_field: str = "prompt"
    """Column with the prompt: a string, or a list of messages; struct.name is a column inside a struct."""
    answer_field: str = "answer"
    """Column with the answer that graders compare with; of a list, each one is right."""
    eval_prompt_field: str | None = None
    """The same for data.eval; by default data.prompt_field."""
    eval_answer_field: str | None = None
    """The same for data.eval; by default data.answer_field."""
    completion_field: str | None = None
    """Column with whole completions, for rollout.on_policy below 1; by default the assistant's last turns."""
    teacher_field: str | None = None
    """Column that names the teacher of a row, for teacher=pool."""
    teacher_template: str | None = None
    """The prompt that the teacher sees, with fields of the row in it: {prompt}, {answer}."""
    eval_teacher_template: str | None = None
    """The same for data.eval; by default data.teacher_template."""
    teacher_system: str | None = None
    """System message that only the teacher sees, when the chat template is used."""
    teacher_chat_template: str | None = None
    """The same as data.chat_template for the teacher's prompts; by default the student's template."""
    teacher_chat_options: dict[str, Any] | None = None
    """Options of the chat template for the teacher's prompts; by default data.chat_options."""
    answer_regex: str | None = None
    """Regular expression whose first group is the answer, for example '#### (.*)' on GSM8K."""
    template: str | None = None
    """Text around a string prompt, or around the last user's turn of messages, with {prompt} in it."""
    chat: bool = False
    """Put string prompts into the tokenizer's chat template as the user's turn."""
    chat_template: str | None = None
    """A .jinja file, or a folder or hub id, whose chat template is used; by default the student's own."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """Options of the chat template, for example {enable_thinking: false} with Qwen3."""
    tools_field: str = "tools"
    """Column with the tools of a row for the chat template: a list of JSON schemas, or it as text."""
    system: str | None = None
    """System message, when the chat template is used."""
    max_prompt_tokens: int | None = bounded(None, least=1)
    """Longest prompt in tokens; by default what the model's context leaves beside the completion."""
    filter_overlong_prompts: bool = False
    """Drop longer prompts and say how many; by default they are refused."""
    limit: int | None = bounded(None, least=1)
    """Use only the first so many rows of data.train; of a list, of each entry."""
    eval_limit: int | None = bounded(None, least=1)
    """The same for data.eval."""

    def for_eval(self) -> "DataConfig":
        """The settings with which data.eval is read."""
        return replace(
            self,
            subset=self.eval_subset or self.subset,
            split=self.eval_split,
            revision=self.eval_revision or (self.revision if self.eval == self.train else None),
            prompt_field=self.eval_prompt_field or self.prompt_field,
            answer_field=self.eval_answer_field or self.answer_field,
            teacher_template=self.eval_teacher_template or self.teacher_template,
            completion_field=None,
            limit=self.eval_limit,
        )
