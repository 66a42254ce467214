"""Whether a teacher's token ids mean the same tokens as the student's, and which ids both have."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from opd.types import TeacherInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The student's tokenizer and embedding, to compare with a ``TeacherInfo``.

    ``fingerprint`` and ``tokenizer_size`` describe its tokenizer; ``matrix_size`` counts the rows
    of its embedding, padding included. ``base_fingerprint`` and ``added_tokens`` as ``TeacherInfo``.
    ``owner`` and ``remedy`` are words for messages.
    """

    fingerprint: str
    tokenizer_size: int
    matrix_size: int
    base_fingerprint: str = ""
    added_tokens: dict[str, int] = field(default_factory=dict)
    owner: str = "the student"
    remedy: str = (
        "choose a teacher with the student's tokenizer, or set teacher.tokenizer=own, with which the "
        "teacher reads the text in its own tokens"
    )


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 over the sorted (id, token) pairs of a Hugging Face tokenizer.

    Merges, normalisers and chat templates are left out: a teacher receives ids, so only the token of
    each id must agree.
    """
    return _hashed(tokenizer.get_vocab())


def base_and_added(tokenizer: Any) -> tuple[str, dict[str, int]]:
    """The added tokens that end the vocabulary, behind the fingerprint of the ids before them."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    end = max(vocabulary.values()) + 1
    own = set(vocabulary.values()) - set(tokenizer.added_tokens_decoder)
    first = max(own) + 1 if own else end
    added = {token: index for token, index in vocabulary.items() if index >= first}
    return _hashed({t: i for t, i in vocabulary.items() if i < first}), added


def _hashed(vocabulary: dict[str, int]) -> str:
    pairs = sorted((index, token) for token, index in vocabulary.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def read_vocabulary(tokenizer: Any, matrix_size: int) -> Vocabulary:
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
    """Why this teacher cannot score the student; None if it can.

    Equal tokenizers fit, and those that differ only in tokens added at the end: the other side treats
    these as padding.
    """
    if info.tokenizer_fingerprint != student.fingerprint:
        based = info.base_fingerprint and info.base_fingerprint == student.base_fingerprint
        clash = _first_clash(info.added_tokens, student.added_tokens) if based else None
        if not based:
            return (
                f"teacher {info.model} has another tokenizer ({info.tokenizer_size} tokens, "
                f"fingerprint {info.tokenizer_fingerprint[:12]}) than {student.owner} "
                f"({student.tokenizer_size} tokens, fingerprint {student.fingerprint[:12]}), so the "
                f"same id means another token; {student.remedy}"
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


def _first_clash(teacher: dict[str, int], student: dict[str, int]) -> int | None:
    """The first id that is another added token on each side, or a token that has another id."""
    tokens = {index: token for token, index in teacher.items()}
    clashes = [i for t, i in student.items() if tokens.get(i, t) != t or teacher.get(t, i) != i]
    return min(clashes, default=None)


def common_vocab_size(student_vocab_size: int, info: TeacherInfo) -> int:
    """How many ids both matrices have.

    Models of one family pad the same tokenizer to different sizes (151936 and 152064): ids from the
    smaller size on are no token that both have, and get no probability on either side. The mass that
    they would have had is reported as ``teacher/outside_mass`` and ``student/outside_mass``.
    """
    return min(student_vocab_size, info.vocab_size)


def require_fit(info: TeacherInfo, student: Vocabulary) -> int:
    """The common vocabulary size; ``ValueError`` saying why when the two do not fit."""
    reason = fits(info, student)
    if reason is not None:
        raise ValueError(reason)
    return common_vocab_size(student.matrix_size, info)
