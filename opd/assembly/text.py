"""What a model folder says of tokens, and every prompt of a run, tokenised."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.config.schema import Config
from opd.config.writing import DataConfig, VllmRolloutConfig
from opd.interfaces import (
    PromptStream,
)
from opd.types import Prompt

if TYPE_CHECKING:
    from opd.data.prompts import Completions, TeacherView


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A tokenizer and what the student's folder says about tokens and lengths.

    ``stop_ids`` end a completion; ``max_length`` is the model's context in tokens;
    ``vocab_size`` counts the rows of its embedding.
    """

    tokenizer: Any
    stop_ids: list[int]
    pad_id: int
    max_length: int
    vocab_size: int

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """What the run learns from and is examined on; each list fits the model's context."""

    train: list[Prompt]
    eval: list[Prompt]
    divergence: list[Prompt]
    max_length: int
    """Longest prompt plus completion that can occur, in tokens."""
    teacher_max_length: int
    """The same with prompts as the teacher sees them."""


def build_text(model: str, *, trust_remote_code: bool) -> Text:
    """Read tokenizer and configs of a model folder or hub id.

    Raises ValueError when there is no such model, or no end token.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"student.model={model} cannot be read as a model folder or hub id ({first})"
        ) from None
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    listed = ends if isinstance(ends, list) else [ends]
    stop_ids = sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})
    if not stop_ids:
        raise ValueError(
            f"student.model={model} names no end token: set eos_token in its tokenizer"
        )
    text = config.get_text_config()
    pad_id = tokenizer.pad_token_id
    return Text(
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        pad_id=stop_ids[0] if pad_id is None else pad_id,
        max_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )


def build_prompts(config: Config, text: Text) -> Prompts:
    """Load and tokenise every prompt. Raises ValueError naming file and line of what is wrong."""
    data, longest = config.data, text.max_length
    if isinstance(config.rollout, VllmRolloutConfig) and config.rollout.max_length:
        longest = min(longest, config.rollout.max_length)
    written = config.rollout.max_tokens
    answered = config.eval.max_tokens or written
    train = _read(config, text, data.train, longest - written, held_out=False)
    held_out: list[Prompt] = []
    if data.eval is not None:
        held_out = _read(config, text, data.eval, longest - max(answered, written), held_out=True)
    divergence = held_out
    if config.eval.kl_data is not None:
        divergence = _read(config, text, config.eval.kl_data, longest - written, held_out=True)
    every = [*train, *held_out, *divergence]
    lengths = [len(p.token_ids) for p in every]
    return Prompts(
        train=train,
        eval=held_out,
        divergence=divergence[: config.eval.kl_prompts],
        max_length=min(longest, max(lengths) + max(written, answered)),
        teacher_max_length=max(_longest_seen(every) + written, _longest_seen(held_out) + answered),
    )


def _longest_seen(prompts: Sequence[Prompt]) -> int:
    """Of the teacher's prompts."""
    seen = (p.token_ids if p.teacher_ids is None else p.teacher_ids for p in prompts)
    return max(map(len, seen), default=0)


def _read(config: Config, text: Text, source: str, room: int, *, held_out: bool) -> list[Prompt]:
    from opd.data.prompts import load_prompts

    data = config.data
    if room < 1:
        raise ValueError(
            f"rollout.max_tokens leaves no room for a prompt in the model's context of "
            f"{text.max_length} tokens: lower it"
        )
    return load_prompts(
        source,
        text.tokenizer,
        prompt_field=(data.eval_prompt_field if held_out else None) or data.prompt_field,
        answer_field=(data.eval_answer_field if held_out else None) or data.answer_field,
        answer_regex=data.answer_regex,
        template=data.template,
        split=data.eval_split if held_out else data.split,
        subset=(data.eval_subset if held_out else None) or data.subset,
        chat_template=data.chat,
        system=data.system,
        limit=data.eval_limit if held_out else data.limit,
        max_prompt_tokens=room,
        teacher_field=data.teacher_field,
        completions=None if held_out else _completions(config, text),
        teacher_view=_teacher_view(data, text, held_out=held_out),
    )


def _completions(config: Config, text: Text) -> "Completions | None":
    from opd.data.prompts import Completions

    if config.data.completion_field is None or config.rollout.on_policy == 1:
        return None
    end = text.tokenizer.eos_token_id
    return Completions(
        field=config.data.completion_field,
        tokenizer=text.tokenizer,
        end_id=text.stop_ids[0] if end is None else end,
        max_tokens=config.rollout.max_tokens,
    )


def _teacher_view(data: DataConfig, text: Text, *, held_out: bool) -> "TeacherView | None":
    from opd.data.prompts import TeacherView

    template = (data.eval_teacher_template if held_out else None) or data.teacher_template
    if not (template or data.teacher_system or data.teacher_chat_template):
        return None
    return TeacherView(
        template=template,
        system=data.teacher_system,
        tokenizer=_teachers_tokenizer(data, text),
    )


def _teachers_tokenizer(data: DataConfig, text: Text) -> Any:
    """The tokenizer whose chat template the teacher's prompts use; ValueError if its ids differ."""
    if data.teacher_chat_template is None:
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(data.teacher_chat_template)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"data.teacher_chat_template={data.teacher_chat_template} cannot be read as a model "
            f"folder or hub id ({first})"
        ) from None
    if tokenizer.get_vocab() != text.tokenizer.get_vocab():
        raise ValueError(
            f"data.teacher_chat_template={data.teacher_chat_template} has another vocabulary than "
            "the student: name a model with the student's tokenizer"
        )
    return tokenizer


def build_stream(config: Config, prompts: Prompts, *, rank: int, size: int) -> PromptStream:
    """The training prompts in their seeded order; ValueError when a step needs more than there are."""
    from opd.data.stream import ShuffledPrompts

    return ShuffledPrompts(prompts.train, config.train.prompts_per_step, config.seed, rank, size)
