"""The tokenised prompts of a run: for training, for evaluation, and for the divergence to the teacher."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.data import DataConfig
from opd.config.reward import FunctionRewardConfig, GraderRewardConfig
from opd.config.rollout import VllmEngineConfig
from opd.config.schema import Config
from opd.config.teacher import TeacherTokenizer
from opd.data.chat_template import read_chat_template, read_template_tokenizer
from opd.data.completions import Completions
from opd.data.prompts import LoadedPrompts, RequiredAnswers, load_prompts
from opd.data.stream import PromptGroup
from opd.data.tokenizer import StudentTokenizer, read_tokenizer
from opd.types import Prompt

EVALUATION_ANSWERS = RequiredAnswers(
    who="the evaluation", setting="data.eval_answer_field or data.answer_field"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSets:
    """Prompts for training, for evaluation and for the divergence; all fit the model's context."""

    train: Sequence[Prompt]
    eval: Sequence[Prompt]
    divergence: Sequence[Prompt]
    max_length: int
    """Longest prompt plus completion that can occur, in tokens."""
    teacher_max_length: int
    """The same for prompts as the teacher sees them."""
    groups: tuple[PromptGroup, ...] = ()
    """The data sets of the training prompts, with their shares of a step."""
    notes: tuple[str, ...] = ()
    """What was left out of the data sets, one sentence each."""

    @property
    def probe(self) -> list[int]:
        """Token ids of real text, for comparisons of models: the first training prompts."""
        return [int(i) for prompt in self.train[:8] for i in prompt.token_ids]


def read_prompt_sets(
    config: Config, student: StudentTokenizer, *, grades_training: bool = False
) -> PromptSets:
    """Load and tokenise every prompt. Raises ValueError naming file and line of what is wrong.

    Held-out prompts need answers; training prompts do with reward=grader or ``grades_training``.
    """
    data, context = config.data, student.max_length
    if isinstance(config.rollout, VllmEngineConfig) and config.rollout.max_model_len:
        context = min(context, config.rollout.max_model_len)
    train_tokens = config.rollout.max_tokens
    eval_tokens = config.eval.max_tokens or train_tokens
    reader = _SetReader(student=student, teacher_tokenizer=_teacher_tokenizer(config, student))
    train = reader.read(
        "data.train",
        data.train,
        data,
        context - train_tokens,
        completions=_completions(config, student),
        answers=_training_answers(config, grades_training),
        keep_rows=isinstance(config.reward, FunctionRewardConfig),
    )
    held_out: LoadedPrompts | None = None
    if data.eval is not None:
        room = context - max(eval_tokens, train_tokens)
        held_out = reader.read(
            "data.eval", data.eval, data.for_eval(), room, answers=EVALUATION_ANSWERS
        )
    divergence = held_out
    if config.eval.kl_data is not None:
        room = context - train_tokens
        divergence = reader.read("eval.kl_data", config.eval.kl_data, data.for_eval(), room)
    loaded = [each for each in (train, held_out, divergence) if each is not None]
    longest = max(each.longest for each in loaded)
    seen_longest = max(each.teacher_longest for each in loaded)
    held_out_longest = 0 if held_out is None else held_out.teacher_longest
    return PromptSets(
        train=train.prompts,
        eval=[] if held_out is None else held_out.prompts,
        # two vocabularies have no divergence over one
        divergence=[]
        if divergence is None or config.teacher.tokenizer == TeacherTokenizer.own
        else divergence.prompts[: config.eval.kl_prompts],
        max_length=min(context, longest + max(train_tokens, eval_tokens)),
        teacher_max_length=max(seen_longest + train_tokens, held_out_longest + eval_tokens),
        groups=train.groups,
        notes=tuple(dict.fromkeys(note for each in loaded for note in each.notes)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _SetReader:
    student: StudentTokenizer
    teacher_tokenizer: Any

    def read(
        self,
        setting: str,
        source: Any,
        data: DataConfig,
        room: int,
        completions: Completions | None = None,
        answers: RequiredAnswers | None = None,
        keep_rows: bool = False,
    ) -> LoadedPrompts:
        """The prompts of what ``setting`` names; each has at most ``room`` tokens."""
        if room < 1:
            raise ValueError(
                f"rollout.max_tokens or eval.max_tokens leaves no room for a prompt in the model's context "
                f"of {self.student.max_length} tokens: lower it"
            )
        return load_prompts(
            source,
            self.student.tokenizer,
            data,
            setting=setting,
            max_prompt_tokens=room,
            completions=completions,
            teacher_tokenizer=self.teacher_tokenizer,
            answers=answers,
            keep_rows=keep_rows,
        )


def _training_answers(config: Config, grades_training: bool) -> RequiredAnswers | None:
    if isinstance(config.reward, GraderRewardConfig):
        return RequiredAnswers(who="reward=grader", setting="data.answer_field")
    if grades_training:
        return RequiredAnswers(who="the grader", setting="data.answer_field")
    return None


def _completions(config: Config, student: StudentTokenizer) -> Completions | None:
    if config.rollout.on_policy == 1:
        return None
    return Completions.of_student(
        student, field=config.data.completion_field, max_tokens=config.rollout.max_tokens
    )


def _teacher_tokenizer(config: Config, student: StudentTokenizer) -> Any:
    """The teacher's own, or that of data.teacher_chat_template, which must have the student's vocabulary.

    None where the teacher's prompts are the student's in template and tokens.
    """
    if config.teacher.tokenizer == TeacherTokenizer.own and config.teacher.model is not None:
        return read_tokenizer(config.teacher.model, setting="teacher.model").tokenizer
    setting, name = "data.teacher_chat_template", config.data.teacher_chat_template
    if name is None:
        return None
    if Path(name).is_file() or Path(name).suffix == ".jinja":
        tokenizer = copy.copy(student.tokenizer)
        tokenizer.chat_template = read_chat_template(setting, name)
        return tokenizer
    tokenizer = read_template_tokenizer(setting, name)
    if tokenizer.get_vocab() != student.tokenizer.get_vocab():
        raise ValueError(
            f"{setting}={name} has another vocabulary than the student: name a model with the student's "
            "tokenizer, or a .jinja file"
        )
    return tokenizer
