"""The tokenizer of a model, its end tokens, its context length and its vocabulary size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from opd.config.student import StudentConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentTokenizer:
    """A tokenizer with what the model's configs say about tokens and lengths.

    ``stop_ids`` end a completion; ``max_length`` is the model's context in tokens;
    ``vocab_size`` is the number of rows of its embedding.
    """

    tokenizer: Any
    stop_ids: list[int]
    pad_id: int
    max_length: int
    vocab_size: int

    @property
    def end_id(self) -> int:
        """The token that is appended to a completion of a data set."""
        end = self.tokenizer.eos_token_id
        return self.stop_ids[0] if end is None else end

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def read_student_tokenizer(student: StudentConfig) -> StudentTokenizer:
    """Read tokenizer and configs of ``student.model``.

    Raises ValueError when there is no such model, or no end token.
    """
    return read_tokenizer(student.model, trust_remote_code=student.trust_remote_code)


def read_tokenizer(model: str, *, trust_remote_code: bool = False) -> StudentTokenizer:
    """Read tokenizer and configs of a model folder or hub id.

    Raises ValueError when there is no such model, or no end token.
    """
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
        raise ValueError(f"student.model={model} has no end token: set eos_token in its tokenizer")
    text = config.get_text_config()
    pad_id = tokenizer.pad_token_id
    return StudentTokenizer(
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        pad_id=stop_ids[0] if pad_id is None else pad_id,
        max_length=text.max_position_embeddings,
        vocab_size=text.vocab_size,
    )
