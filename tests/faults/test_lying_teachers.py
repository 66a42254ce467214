"""Scores that no model can have given end a run, and all that a model can give pass."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from opd.faults import RunError
from opd.teacher.checked import CheckedTeacher, find_fault
from opd.types import (
    FinishReason,
    FloatArray,
    Prompt,
    Rollout,
    ScoredRollout,
    SupportLogps,
    TeacherInfo,
)

VOCAB, TOKENS, K = 40, 7, 5
DRAW = np.random.default_rng(0)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return (logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)).astype(np.float32)


def whole(scale: float = 3.0) -> ScoredRollout:
    """All that a teacher can say about a completion, rightly."""
    logps_TV = log_softmax(DRAW.normal(size=(TOKENS, VOCAB)) * scale)
    ids = DRAW.integers(0, VOCAB, TOKENS).astype(np.int32)
    rollout = Rollout(
        prompt=Prompt(uid="p7", token_ids=np.array([1, 2], np.int32)),
        token_ids=ids,
        logps=np.zeros(TOKENS, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )
    top_ids = np.argsort(-logps_TV, 1)[:, :K].astype(np.int32)
    top = np.take_along_axis(logps_TV, top_ids, 1)
    tail = np.log1p(-np.minimum(np.exp(top.astype(np.float64)).sum(1), 1 - 1e-12))
    return ScoredRollout(
        rollout=rollout,
        logps=logps_TV[np.arange(TOKENS), ids],
        support=SupportLogps(ids=top_ids, logps=top, tail_logp=tail.astype(np.float32)),
        full_logps=logps_TV,
        hidden=DRAW.normal(size=(TOKENS, 8)).astype(np.float32),
        outside=np.full(TOKENS, 0.1, np.float32),
    )


def set_at(field: str, value: float, *place: int) -> Callable[[ScoredRollout], ScoredRollout]:
    def change(scored: ScoredRollout) -> ScoredRollout:
        array = getattr(scored, field).copy()
        array[place] = value
        return replace(scored, **{field: array})

    return change


def in_support(**changes: Callable[[Any], Any]) -> Callable[[ScoredRollout], ScoredRollout]:
    def change(scored: ScoredRollout) -> ScoredRollout:
        assert scored.support is not None
        new = {name: how(getattr(scored.support, name)) for name, how in changes.items()}
        return replace(scored, support=replace(scored.support, **new))

    return change


def likeliest_sampled(scored: ScoredRollout) -> ScoredRollout:
    """The same, of a completion of likeliest tokens, which lie in the support."""
    assert scored.support is not None
    rollout = replace(scored.rollout, token_ids=scored.support.ids[:, 0])
    return replace(scored, rollout=rollout, logps=scored.support.logps[:, 0])


LIES: dict[str, Callable[[ScoredRollout], ScoredRollout]] = {
    "nan": set_at("logps", np.nan, 3),
    "-inf": set_at("logps", -np.inf, 3),
    "inf": set_at("logps", np.inf, 0),
    "a positive log-prob": set_at("logps", 0.5, 6),
    "nan in the distribution": set_at("full_logps", np.nan, 2, 5),
    "a positive log-prob in the distribution": set_at("full_logps", 3.4, 2, 5),
    "all NaN": lambda s: replace(s, logps=np.full_like(s.logps, np.nan)),  # type: ignore[arg-type]
    "probabilities": lambda s: replace(s, full_logps=np.exp(s.full_logps)),  # type: ignore[arg-type]
    "logits": lambda s: replace(s, full_logps=s.full_logps + 1),  # type: ignore[operator]
    "rows one later": lambda s: replace(s, full_logps=np.roll(s.full_logps, 1, 0)),  # type: ignore
    "rows reversed": lambda s: replace(s, full_logps=s.full_logps[::-1]),  # type: ignore[index]
    "sampled rows reversed": lambda s: replace(s, logps=s.logps[::-1]),  # type: ignore[index]
    "nan in the support": in_support(logps=lambda x: np.where(x == x[1, 1], np.nan, x)),
    "a positive log-prob in the support": in_support(logps=lambda x: x + 2),
    "support rows reversed": lambda s: in_support(
        ids=lambda x: x[::-1], logps=lambda x: x[::-1], tail_logp=lambda x: x[::-1]
    )(likeliest_sampled(replace(s, full_logps=None))),
    "a support without its tail": in_support(tail_logp=lambda x: np.full_like(x, -np.inf)),
    "a tail of nan": in_support(tail_logp=lambda x: x * np.nan),
    "a tail counted twice": in_support(tail_logp=lambda x: x + 0.7),
    "a hidden state of nan": set_at("hidden", np.nan, 0, 3),
    "a hidden state of inf": set_at("hidden", np.inf, TOKENS - 1, 3),
    "bfloat16 nan": lambda s: replace(s, hidden=np.full((TOKENS, 8), 0x7FC0, np.uint16)),
    "a probability of 2": set_at("outside", 2.0, 1),
    "a probability of nan": set_at("outside", np.nan, 1),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lie_is_found(name: str) -> None:
    fault = find_fault(LIES[name](whole()))
    assert fault is not None
    assert "\n" not in fault


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 60.0])
def test_what_a_model_says_passes(scale: float) -> None:
    for _ in range(50):
        scored = whole(scale)
        assert find_fault(scored) is None
        assert find_fault(likeliest_sampled(scored)) is None
        bits = (scored.hidden.view(np.uint32) >> 16).astype(np.uint16)  # type: ignore[union-attr]
        assert find_fault(replace(scored, hidden=bits)) is None


def test_an_empty_and_a_ragged_support_pass() -> None:
    scored = likeliest_sampled(whole())
    assert scored.support is not None
    ids, logps = scored.support.ids.copy(), scored.support.logps.copy()
    tail = scored.support.tail_logp.copy()
    ids[0], logps[0], tail[0] = -1, -np.inf, 0.0
    tail[1] = np.logaddexp(tail[1], logps[1, -1])
    ids[1, -1], logps[1, -1] = -1, -np.inf
    ragged = SupportLogps(ids=ids, logps=logps, tail_logp=tail)
    assert find_fault(replace(scored, support=ragged)) is None


class Liar:
    """Answers as told."""

    def __init__(self, scored: ScoredRollout) -> None:
        self._scored = scored

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        return [self._scored]

    def info(self) -> TeacherInfo:
        return TeacherInfo(
            model="some/teacher", vocab_size=VOCAB, hidden_size=8, tokenizer_fingerprint="",
            tokenizer_size=VOCAB, max_length=64, dtype="float32", linear_head=True,
            base_fingerprint="", added_tokens={},
        )  # fmt: skip

    def head(self, name: str | None = None) -> FloatArray:
        return np.zeros((VOCAB, 8), np.float32)


def test_teacher_and_prompt_are_named() -> None:
    right = whole()
    assert CheckedTeacher(Liar(right)).score([right.rollout]) == [right]
    wrong = LIES["nan"](right)
    with pytest.raises(
        RunError, match=r"some/teacher .* prompt p7: the log-prob of token 3 is nan"
    ):
        CheckedTeacher(Liar(wrong)).score([wrong.rollout])
