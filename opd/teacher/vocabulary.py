"""Whether a teacher's token ids mean what the student's mean, and which of them both may use."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from opd.types import TeacherInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The student's side of the comparison.

    ``fingerprint`` and ``tokenizer_size`` describe its tokenizer; ``matrix_size`` counts the rows
    of its embedding, padding included.
    """

    fingerprint: str
    tokenizer_size: int
    matrix_size: int


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the sorted (id, token) pairs of a Hugging Face tokenizer.

    Merges, normalisers and chat templates are left out: a teacher is sent ids, so only what each id
    stands for must agree.
    """
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def vocabulary_of(tokenizer: Any, matrix_size: int) -> Vocabulary:
    """The ``Vocabulary`` of a tokenizer and a model whose embedding has ``matrix_size`` rows."""
    return Vocabulary(
        fingerprint=fingerprint(tokenizer),
        tokenizer_size=len(tokenizer),
        matrix_size=matrix_size,
    )


def fits(info: TeacherInfo, *, fingerprint: str, tokenizer_size: int) -> str | None:
    """Why this teacher cannot score a student with that tokenizer; None if it can."""
    if info.tokenizer_fingerprint != fingerprint:
        return (
            f"teacher {info.model} has another tokenizer ({info.tokenizer_size} tokens, "
            f"fingerprint {info.tokenizer_fingerprint[:12]}) than the student "
            f"({tokenizer_size} tokens, fingerprint {fingerprint[:12]}), so the same id means "
            "another token; choose a teacher with the student's tokenizer"
        )
    if tokenizer_size > info.vocab_size:
        return (
            f"the tokenizer has {tokenizer_size} tokens and teacher {info.model} has output rows "
            f"for {info.vocab_size} only; choose a teacher whose head covers the tokenizer"
        )
    return None


def common_vocab_size(student_vocab_size: int, info: TeacherInfo) -> int:
    """The ids that both matrices have.

    One family pads the same tokenizer to different sizes (151936 and 152064): ids from the smaller
    size on stand for no token, and neither side gives them probability.
    """
    return min(student_vocab_size, info.vocab_size)


def require_fit(info: TeacherInfo, student: Vocabulary) -> int:
    """The common vocabulary size; ``ValueError`` saying why when the two do not fit."""
    reason = fits(info, fingerprint=student.fingerprint, tokenizer_size=student.tokenizer_size)
    if reason is not None:
        raise ValueError(reason)
    return common_vocab_size(student.matrix_size, info)
