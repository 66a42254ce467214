"""The tokenizer of a model, its end tokens, its context length and its vocabulary size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from opd.config.student import StudentConfig
from opd.data.chat import end_of_turn
from opd.data.chat_template import read_chat_template
from opd.model_head import read_model_config, unreadable_model


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTokenizer:
    """A tokenizer with what the model's configs say about tokens and lengths.

    ``stop_ids`` end a completion: ``declared_stop_ids``, the end tokens of tokenizer and generation
    config, and ``turn_end_id``, the token that the chat template writes behind an answer (``end_id``
    where it writes none); ``max_length`` is the model's context in tokens; ``vocab_size`` is the
    number of rows of its embedding.
    """

    tokenizer: Any
    declared_stop_ids: list[int]
    turn_end_id: int
    pad_id: int
    max_length: int
    vocab_size: int

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a completion, in order."""
        return sorted({*self.declared_stop_ids, self.turn_end_id})

    @property
    def end_id(self) -> int:
        """The token that ends a completion of plain text."""
        return plain_end(self.tokenizer, self.declared_stop_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text with special tokens, and with the space that the first token may begin with."""
        text = self._decode(ids, skip_special_tokens=False)
        if not adds_first_space(self.tokenizer):
            return text
        line = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        start = self._decode(line, skip_special_tokens=False)
        behind = self._decode([*line, *ids], skip_special_tokens=False)
        return f" {text}" if behind == f"{start} {text}" else text

    def _decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        # The clean-up removes spaces before punctuation, so that "x != y" would become "x!= y".
        return self.tokenizer.decode(
            ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


def adds_first_space(tokenizer: Any) -> bool:
    """Whether a text begins with another token than the same text behind a line (SentencePiece's "▁")."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return any(ids(f"\n{char}")[-len(ids(char)) :] != ids(char) for char in "A1")


def plain_end(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """The token that ends plain text: the tokenizer's eos, else the first of ``stop_ids``."""
    end = tokenizer.eos_token_id
    return stop_ids[0] if end is None else end


def read_student_tokenizer(
    student: StudentConfig, chat_template: str | None = None
) -> StudentTokenizer:
    """Read tokenizer and configs of ``student.model``; see ``read_tokenizer``."""
    return read_tokenizer(
        student.model, trust_remote_code=student.trust_remote_code, chat_template=chat_template
    )


def read_tokenizer(
    model: str,
    *,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
    setting: str = "student.model",
) -> StudentTokenizer:
    """Read tokenizer and configs of a model folder or hub id, which ``setting`` names.

    chat_template: what data.chat_template names; it takes the place of the tokenizer's own.

    Raises ValueError when there is no such model or template, or no end token.
    """
    config = read_model_config(model, setting=setting, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        max_length = int(text.max_position_embeddings)
    except Exception as error:  # a damaged tokenizer.json raises what its parser raises
        raise unreadable_model(setting, model, error) from None
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template("data.chat_template", chat_template)
    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:
        ends = None
    except Exception as error:  # a generation_config.json of the wrong shape
        raise unreadable_model(setting, model, error) from None
    listed = ends if isinstance(ends, list) else [ends]
    stop_ids = sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})
    if not stop_ids:
        raise ValueError(f"{setting}={model} has no end token: set eos_token in its tokenizer")
    try:
        turn_end = end_of_turn(tokenizer, stop_ids)
    except ValueError:  # a template that renders no answer: a check says so where it is used
        turn_end = None
    if turn_end is None or turn_end >= text.vocab_size:
        turn_end = plain_end(tokenizer, stop_ids)
    pad_id = tokenizer.pad_token_id
    return StudentTokenizer(
        tokenizer=tokenizer,
        declared_stop_ids=stop_ids,
        turn_end_id=turn_end,
        pad_id=stop_ids[0] if pad_id is None else pad_id,
        max_length=max_length,
        vocab_size=text.vocab_size,
    )
