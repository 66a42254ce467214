"""Whether a teacher's token ids mean what the student's mean, and which of them both may use."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from opd.types import TeacherInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The student's side of the comparison.

    ``fingerprint`` and ``tokenizer_size`` describe its tokenizer; ``matrix_size`` counts the rows
    of its embedding, padding included. ``base_fingerprint`` and ``added_tokens`` as ``TeacherInfo``.
    """

    fingerprint: str
    tokenizer_size: int
    matrix_size: int
    base_fingerprint: str = ""
    added_tokens: dict[str, int] = field(default_factory=dict)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the sorted (id, token) pairs of a Hugging Face tokenizer.

    Merges, normalisers and chat templates are left out: a teacher is sent ids, so only what each id
    stands for must agree.
    """
    return _hashed(tokenizer.get_vocab())


def base_and_added(tokenizer: Any) -> tuple[str, dict[str, int]]:
    """The fingerprint of the ids before the added tokens that end the vocabulary, and those tokens."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    end = max(vocabulary.values()) + 1
    own = set(vocabulary.values()) - set(tokenizer.added_tokens_decoder)
    first = max(own) + 1 if own else end
    added = {token: index for token, index in vocabulary.items() if index >= first}
    return _hashed({t: i for t, i in vocabulary.items() if i < first}), added


def _hashed(vocabulary: dict[str, int]) -> str:
    pairs = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def vocabulary_of(tokenizer: Any, matrix_size: int) -> Vocabulary:
    """The ``Vocabulary`` of a tokenizer and a model whose embedding has ``matrix_size`` rows."""
    base, added = base_and_added(tokenizer)
    return Vocabulary(
        fingerprint=fingerprint(tokenizer),
        base_fingerprint=base,
        added_tokens=added,
        tokenizer_size=len(tokenizer),
        matrix_size=matrix_size,
    )


def fits(info: TeacherInfo, student: Vocabulary) -> str | None:
    """Why this teacher cannot score that student; None if it can.

    Equal tokenizers fit, and those that differ only in tokens which one of them has added at its
    end: these are then padding to the other.
    """
    if info.tokenizer_fingerprint != student.fingerprint:
        based = info.base_fingerprint and info.base_fingerprint == student.base_fingerprint
        clash = _clash(info.added_tokens, student.added_tokens) if based else None
        if not based:
            return (
                f"teacher {info.model} has another tokenizer ({info.tokenizer_size} tokens, "
                f"fingerprint {info.tokenizer_fingerprint[:12]}) than the student "
                f"({student.tokenizer_size} tokens, fingerprint {student.fingerprint[:12]}), so the "
                "same id means another token; choose a teacher with the student's tokenizer"
            )
        if clash is not None:
            return (
                f"teacher {info.model} and the student have the same tokenizer but for added tokens, "
                f"and id {clash} is another one on each side; choose a teacher with the student's "
                "tokenizer, or add the tokens at the same ids"
            )
    shared = min(student.tokenizer_size, info.tokenizer_size)
    if shared > info.vocab_size:
        return (
            f"the tokenizer has {shared} tokens and teacher {info.model} has output rows "
            f"for {info.vocab_size} only; choose a teacher whose head covers the tokenizer"
        )
    return None


def _clash(theirs: dict[str, int], ours: dict[str, int]) -> int | None:
    """The first id that is another added token on each side, or a token that has another id."""
    names = {index: token for token, index in theirs.items()}
    different = [i for t, i in ours.items() if names.get(i, t) != t or theirs.get(t, i) != i]
    return min(different, default=None)


def common_vocab_size(student_vocab_size: int, info: TeacherInfo) -> int:
    """The ids that both matrices have.

    One family pads the same tokenizer to different sizes (151936 and 152064): ids from the smaller
    size on stand for no token that both know, and neither side gives them probability. What each
    would have given them is reported as ``teacher/outside_mass`` and ``student/outside_mass``.
    """
    return min(student_vocab_size, info.vocab_size)


def require_fit(info: TeacherInfo, student: Vocabulary) -> int:
    """The common vocabulary size; ``ValueError`` saying why when the two do not fit."""
    reason = fits(info, student)
    if reason is not None:
        raise ValueError(reason)
    return common_vocab_size(student.matrix_size, info)
