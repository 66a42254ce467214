"""Requests and responses survive the wire, and rollouts are grouped into requests that fit."""

import numpy as np
import pytest

from opd.teacher.batches import group_by_tokens
from opd.teacher.wire import (
    Want,
    WireResponse,
    read_request,
    read_response,
    request_bytes,
    response_bytes,
    scored_rollouts,
    wire_request_from,
)
from opd.types import FinishReason, Prompt, Rollout, ScoreRequest


def _rollout(prompt: int, count: int, support: int = 0) -> Rollout:
    ids = np.arange(count, dtype=np.int32)
    named = np.tile(np.arange(support, dtype=np.int32), (count, 1)) if support else None
    return Rollout(
        prompt=Prompt(uid="p", token_ids=np.full(prompt, 7, np.int32)),
        token_ids=ids,
        logps=np.zeros(count, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
        support_ids=named,
    )


def test_a_request_survives_the_wire() -> None:
    request = ScoreRequest(top_k=3, rollout_support=True, temperature=0.1 + 0.2)
    sent = wire_request_from(
        [_rollout(2, 3, 4), _rollout(1, 2, 2)], request, want=Want.hidden, vocab_size=4
    )
    got = read_request(request_bytes(sent))
    assert (got.top_k, got.want, got.temperature, got.vocab_size) == (3, Want.hidden, 0.1 + 0.2, 4)
    assert [s.tolist() for s in got.sequences()] == [[7, 7, 0, 1, 2], [7, 0, 1]]
    assert got.targets().tolist() == [0, 1, 2, 0, 1]
    assert got.named_ids.tolist() == [[0, 1, 2, 3]] * 3 + [[0, 1, -1, -1]] * 2


def test_student_ids_that_the_teacher_lacks_are_left_out() -> None:
    sent = wire_request_from(
        [_rollout(1, 1, 5)], ScoreRequest(rollout_support=True), want=Want.logps, vocab_size=3
    )
    assert sent.named_ids.tolist() == [[0, 1, 2, -1, -1]]


def test_a_response_survives_the_wire_and_is_split_by_rollout() -> None:
    response = WireResponse(
        logps=np.arange(5, dtype=np.float32),
        support_ids=np.arange(10, dtype=np.int32).reshape(5, 2),
        support_logps=np.full((5, 2), -np.inf, np.float32),
        support_tail=np.zeros(5, np.float32),
        hidden=np.ones((5, 3), np.float32),
    )
    first, second = scored_rollouts(
        [_rollout(9, 2), _rollout(1, 3)], read_response(response_bytes(response))
    )
    assert first.logps.tolist() == [0, 1]
    assert second.support.ids.tolist() == [[4, 5], [6, 7], [8, 9]]
    assert np.isneginf(second.support.logps).all()
    assert second.hidden.shape == (3, 3)
    assert second.full_logps is None
    assert second.logps.flags.writeable


@pytest.mark.parametrize(
    ("tokens", "targets", "sizes"),
    [(10, None, [2, 1, 1]), (100, None, [4]), (100, 4, [2, 2]), (1, None, [1, 1, 1, 1])],
)
def test_groups_keep_order_and_bounds(tokens: int, targets: int | None, sizes: list[int]) -> None:
    rollouts = [_rollout(3, 2), _rollout(3, 2), _rollout(6, 2), _rollout(3, 2)]
    groups = group_by_tokens(rollouts, tokens, targets=targets)
    assert [len(group) for group in groups] == sizes
    assert [rollout for group in groups for rollout in group] == rollouts
