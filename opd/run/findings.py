"""Likely errors in how student and teacher fit: end tokens, special tokens, templates, images."""

from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from opd.config.reward import FunctionRewardConfig
from opd.config.schema import Config
from opd.config.sources import data_sources
from opd.config.teacher import PoolTeacherConfig, TeacherTokenizer
from opd.data.chat import end_of_turn
from opd.data.idle_options import idle_options
from opd.data.prompt_sets import PromptSets
from opd.data.template import takes_prompt
from opd.data.tokenizer import StudentTokenizer
from opd.teacher.connect import pool_models

INSPECTED = 64
"""How many prompts are inspected; an error of a template is in all of them."""
IMAGE_TOKENS = (
    "<image>",
    "<video>",
    "<|image|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image_soft_token>",
    "<start_of_image>",
    "[IMG]",
)
"""Tokens in whose place a model puts images or videos."""


def findings(config: Config, student: StudentTokenizer, prompts: PromptSets) -> list[str]:
    """One sentence for each setting that would run but is likely to be an error.

    Raises ValueError for what cannot work: image tokens, special tokens outside the embedding.
    """
    found = [
        *prompts.notes,
        *_end_tokens(student, prompts),
        *_special_tokens(student),
        *_prompts(student, prompts),
        *_messages(config, prompts),
        *_chat_settings(config, student, prompts),
        *_answers(config, prompts),
        *_remarks(prompts),
    ]
    for name, tokenizer in _teacher_tokenizers(config):
        if config.teacher.tokenizer == TeacherTokenizer.own:
            continue  # its own ends and its own template are what it gets
        found += _teacher_end_tokens(name, tokenizer, student)
        found += _templates(config, name, tokenizer, student, prompts)
    return found


def _end_tokens(student: StudentTokenizer, prompts: PromptSets) -> Iterator[str]:
    tokenizer = student.tokenizer
    if tokenizer.eos_token_id is None:
        yield (
            "the student's tokenizer has no eos_token: completions of a data set end with token id "
            f"{student.end_id} of its generation config"
        )
    if not any(prompt.is_chat for prompt in prompts.train):
        return
    try:
        end = end_of_turn(tokenizer, student.declared_stop_ids)
    except ValueError as error:
        end = None
        yield f"the end of an answer is not known ({error})"
    declared = tokenizer.convert_ids_to_tokens(student.declared_stop_ids)
    if end is None:
        yield (
            "the chat template writes no end token behind an answer, and the student stops at "
            f"{declared}: completions of a data set end with "
            f"{tokenizer.convert_ids_to_tokens(student.turn_end_id)!r}"
        )
    elif end >= student.vocab_size:
        raise ValueError(
            f"the chat template ends an answer with {tokenizer.convert_ids_to_tokens(end)!r}, id {end}, "
            f"outside the model's {student.vocab_size} embedding rows: resize the model, or use another "
            "chat template"
        )
    elif end not in student.declared_stop_ids:
        yield (
            f"the chat template ends an answer with {tokenizer.convert_ids_to_tokens(end)!r}, and the "
            f"model's files name {declared} as end tokens: this run stops at both; for other engines, "
            f"add {end} to eos_token_id in generation_config.json"
        )


def _messages(config: Config, prompts: PromptSets) -> Iterator[str]:
    """Templates that are put around messages, where strings would get no chat template."""
    data = config.data
    given = [
        f"{setting} {'is put around' if takes_prompt(text, data.prompt_field) else 'takes the place of'}"
        for setting, text in (
            ("data.template", data.template),
            ("data.teacher_template", data.teacher_template),
        )
        if text
    ]
    lists = sum(prompt.is_chat for prompt in prompts.train)
    if given and lists and not config.data.chat:
        yield (
            f"{lists} of the {len(prompts.train)} prompts of data.train are lists of messages: "
            f"{' and '.join(given)} their last user's turn"
        )


def _chat_settings(config: Config, student: StudentTokenizer, prompts: PromptSets) -> Iterator[str]:
    """Settings of the chat template that change no prompt."""
    data = config.data
    if not (data.chat_options or data.chat_template):
        return
    if not any(prompt.is_chat for prompt in prompts.train):
        given = "data.chat_template" if data.chat_template else "data.chat_options"
        yield (
            f"{given} has no effect: no training prompt uses the chat template; set data.chat=true, or give "
            "lists of messages"
        )
        return
    sources = data_sources("data.train", data.train, data)
    for option in idle_options(sources, student.tokenizer):
        yield (
            f"data.chat_options.{option}={data.chat_options.get(option)} changes none of the first prompts: "
            "it is what the chat template does without it, or it concerns turns that they do not have"
        )


def _answers(config: Config, prompts: PromptSets) -> Iterator[str]:
    """What happens to answers that stand behind the prompts, and to those that nobody has."""
    use = (
        "it is the completion that is learned"
        if config.rollout.on_policy < 1 and config.data.completion_field is None
        else "it is left out"
    )
    for setting, those, what in (
        ("data.train", prompts.train, use),
        ("data.eval", prompts.eval, "it is left out"),
    ):
        answered = sum(prompt.has_answer_turn for prompt in those)
        if answered:
            yield (
                f"{answered} of the {len(those)} prompts of {setting} have the assistant's turn behind "
                f"them: {what}, and the prompt ends in front of it"
            )
    unanswered = sum(prompt.answer is None for prompt in prompts.train)
    if isinstance(config.reward, FunctionRewardConfig) and unanswered == len(prompts.train):
        yield (
            f"no training prompt has an answer in field {config.data.answer_field!r}: reward.function "
            "gets None for each; name the field with data.answer_field if it needs one"
        )


def _remarks(prompts: PromptSets) -> Iterator[str]:
    """What was noticed as prompts were read, each with the number of prompts that it is about."""
    for setting, those in (("data.train", prompts.train), ("data.eval", prompts.eval)):
        counts = Counter(remark for prompt in those for remark in set(prompt.remarks))
        for remark, count in counts.items():
            yield f"in {count} of the {len(those)} prompts of {setting}, {remark}"


def _special_tokens(student: StudentTokenizer) -> Iterator[str]:
    outside = [i for i in (*student.stop_ids, student.pad_id) if i >= student.vocab_size]
    if outside:
        raise ValueError(
            f"the student's special token ids {outside} are outside its {student.vocab_size} embedding "
            "rows: resize the model or correct its tokenizer"
        )
    tokenizer = student.tokenizer
    if len(tokenizer) > student.vocab_size:
        yield (
            f"the student's tokenizer has {len(tokenizer)} tokens and its embedding "
            f"{student.vocab_size} rows: the tokens above that cannot be generated"
        )


def _prompts(student: StudentTokenizer, prompts: PromptSets) -> Iterator[str]:
    inspected = prompts.train[:INSPECTED]
    vocabulary = student.tokenizer.get_vocab()
    images = [vocabulary[word] for word in IMAGE_TOKENS if word in vocabulary]
    every_prompt = chain(prompts.train, prompts.eval, prompts.divergence)
    for prompt in every_prompt if images else ():
        if np.isin(prompt.token_ids, images).any():
            raise ValueError(
                f"prompt {prompt.uid} has an image token, and images are not supported: remove such prompts"
            )
    ended = sum(int(p.token_ids[-1]) in student.stop_ids for p in inspected)
    if ended:
        yield (
            f"{ended} of the first {len(inspected)} prompts end with an end token, after which the model "
            "has nothing to generate: check data.template and the tokenizer's chat template"
        )
    doubled = sum(
        len(p.token_ids) > 1 and p.token_ids[0] == p.token_ids[1] == student.tokenizer.bos_token_id
        for p in inspected
    )
    if doubled:
        yield (
            f"{doubled} of the first {len(inspected)} prompts begin with two bos tokens: check the "
            "chat template"
        )


def _teacher_tokenizers(config: Config) -> Iterator[tuple[str, Any]]:
    """(name, tokenizer) of the teachers whose folders or hub ids are known."""
    known = [config.teacher.model] if config.teacher.model else []
    if isinstance(config.teacher, PoolTeacherConfig):
        known = pool_models(config.teacher.members)
    for model in known:
        try:
            yield model, AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError):
            continue  # a server's model may lie on another machine


def _teacher_end_tokens(name: str, teacher: Any, student: StudentTokenizer) -> Iterator[str]:
    end = teacher.eos_token_id
    if end is not None and end not in student.stop_ids:
        stops = student.tokenizer.convert_ids_to_tokens(student.stop_ids)
        yield (
            f"the teacher {name} ends with {teacher.eos_token!r} and the student stops at {stops}: the "
            "teacher gives the student's end tokens little probability, and completions may get longer; use "
            "a teacher tuned with the student's template, or add the id to the student's eos_token_id"
        )


def _templates(
    config: Config, name: str, teacher: Any, student: StudentTokenizer, prompts: PromptSets
) -> Iterator[str]:
    own = student.tokenizer.chat_template
    is_chat = any(prompt.is_chat for prompt in prompts.train)
    if not is_chat or config.data.teacher_chat_template or not teacher.chat_template:
        return
    if teacher.chat_template != own:
        yield (
            f"the teacher {name} has another chat template than the student, but its prompts use the "
            f"student's: set data.teacher_chat_template={name} to use its own"
        )
