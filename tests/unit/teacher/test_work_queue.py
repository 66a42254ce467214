"""Requests that wait together are scored together, and a failure stays with its own request."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from opd.head import HeadSpec
from opd.teacher.wire import WireRequest
from opd.teacher.work_queue import WorkQueue
from opd.types import IntArray, TeacherInfo

INFO = TeacherInfo(
    model="m",
    vocab_size=4,
    hidden_size=4,
    tokenizer_fingerprint="f",
    tokenizer_size=4,
    max_length=16,
)


class GatedBackend:
    """Hidden state = one-hot of the token; the first call waits at ``gate``."""

    info = INFO
    spec = HeadSpec(vocab_size=4)
    head_VD = torch.eye(4)

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()
        self.calls: list[int] = []

    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        self.calls.append(len(sequences))
        self.entered.set()
        self.gate.wait(10)
        if any(len(sequence) == 7 for sequence in sequences):
            raise RuntimeError("seven")
        return [torch.eye(4)[torch.from_numpy(s.astype(np.int64))] for s in sequences]


def _request(length: int) -> WireRequest:
    return WireRequest(
        token_ids=np.ones(length, np.int32),
        lengths=np.array([length], np.int32),
        starts=np.array([1], np.int32),
        vocab_size=4,
    )


def test_waiting_requests_share_a_call_up_to_the_token_bound() -> None:
    backend = GatedBackend()
    work = WorkQueue(lambda: backend, max_waiting_tokens=9)
    first = work.submit(_request(3)).done
    assert backend.entered.wait(10)
    rest = [work.submit(_request(n)).done for n in (3, 4, 2, 3, 100)]
    backend.gate.set()
    responses = [done.result(10) for done in (first, *rest)]
    assert backend.calls == [1, 3, 1, 1]
    assert [len(response.logps) for response in responses] == [2, 2, 3, 1, 2, 99]


def test_a_failing_call_fails_its_requests_and_the_next_one_works() -> None:
    backend = GatedBackend()
    backend.gate.set()
    work = WorkQueue(lambda: backend, max_waiting_tokens=9)
    with pytest.raises(RuntimeError, match="seven"):
        work.submit(_request(8)).done.result(10)
    assert len(work.submit(_request(3)).done.result(10).logps) == 2


def test_backend_raises_what_loading_raised() -> None:
    def build() -> GatedBackend:
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        WorkQueue(build, max_waiting_tokens=9).backend()
