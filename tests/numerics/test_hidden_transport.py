"""At a vocabulary of 151,936: what travels as hidden states trains like the whole distribution."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.batch import Batch, collate
from opd.config.loss import DivergenceLossConfig
from opd.config.student import DType
from opd.head import HeadSpec, head_logps
from opd.losses.divergence import Divergence
from opd.teacher.local import LocalTeacher
from opd.teacher.vocabulary import Vocabulary
from opd.train.chunked import chunked_loss
from opd.types import (
    DivergenceKind,
    FinishReason,
    IntArray,
    Prompt,
    Rollout,
    ScoreRequest,
    TeacherInfo,
)

V, D, TOKENS, CHUNK = 151936, 64, 24, 4
SPEC = HeadSpec(vocab_size=V)
STUDENT = Vocabulary(fingerprint="f", tokenizer_size=1000, matrix_size=V)
MOST_NOISE = 1e-3  # nats a token, of a teacher in float32 whose hidden states travel in bfloat16


def randn(*shape: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TableBackend:
    """The hidden state after a token is a row of a table, in float32 or on the grid of bfloat16."""

    spec = SPEC

    def __init__(self, dtype: torch.dtype) -> None:
        self.table_VD = randn(1000, D, seed=1).to(dtype).float()
        self.head_VD = randn(V, D, seed=2, spread=0.3).to(dtype).float()
        self.info = TeacherInfo(
            model="table",
            vocab_size=V,
            hidden_size=D,
            tokenizer_fingerprint="f",
            tokenizer_size=1000,
            max_length=1 << 20,
            dtype=str(dtype).removeprefix("torch."),
        )

    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """See ``Backend``."""
        return [self.table_VD[torch.from_numpy(ids.astype(np.int64))] for ids in sequences]


def rollout(tokens: int) -> Rollout:
    ids = np.random.default_rng(0).integers(0, 1000, tokens + 1).astype(np.int32)
    return Rollout(
        prompt=Prompt(uid="p", token_ids=ids[:1]),
        token_ids=ids[1:],
        logps=np.zeros(tokens, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )


def travelled(backend: TableBackend, hidden_dtype: DType, tokens: int = TOKENS) -> Batch:
    """What arrives at the learner by the teacher's code."""
    teacher = LocalTeacher(
        backend, request=ScoreRequest(full=True), student=STUDENT, hidden_dtype=hidden_dtype
    )
    return collate(teacher.score([rollout(tokens)]), pad_id=0)


def dense(backend: TableBackend, batch: Batch) -> Batch:
    """The same with the whole distribution of a teacher in this process."""
    (states_LD,) = backend.hidden([batch.input_ids_BT[0].numpy().astype(np.int32)])
    logp_NV = head_logps(states_LD[:-1], backend.head_VD, SPEC)
    return replace(batch, teacher_hidden_ND=None, teacher_logp_NV=logp_NV)


def loss_and_gradients(
    batch: Batch, head_VD: torch.Tensor | None, kind: DivergenceKind
) -> list[torch.Tensor]:
    """Loss a token, and its gradients by the student's hidden states and matrix."""
    hidden = randn(batch.tokens, D, seed=3).requires_grad_()
    weight = randn(V, D, seed=4, spread=0.3).requires_grad_()
    out = chunked_loss(
        hidden,
        weight,
        batch,
        Divergence(DivergenceLossConfig(kind=kind)),
        SPEC,
        teacher_head_VD=head_VD,
        chunk=CHUNK,
    )
    mean = out.total / batch.tokens
    return [mean.detach(), *torch.autograd.grad(mean, (hidden, weight))]


KINDS = [DivergenceKind.reverse_kl, DivergenceKind.forward_kl]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "hidden_dtype"),
    [(torch.float32, DType.float32), (torch.float32, DType.auto), (torch.bfloat16, DType.auto)],
)
def test_exact_transports_train_like_a_full_local_teacher(
    kind: DivergenceKind, dtype: torch.dtype, hidden_dtype: DType
) -> None:
    backend = TableBackend(dtype)
    batch = travelled(backend, hidden_dtype)
    assert batch.teacher_hidden_ND is not None
    assert batch.teacher_hidden_ND.dtype == dtype, "bfloat16 where that loses nothing"
    found = loss_and_gradients(batch, backend.head_VD, kind)
    expected = loss_and_gradients(dense(backend, batch), None, kind)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_of_a_float32_teacher_is_noise_of_a_known_size(kind: DivergenceKind) -> None:
    backend = TableBackend(torch.float32)
    batch = travelled(backend, DType.bfloat16)
    assert batch.teacher_hidden_ND is not None
    assert batch.teacher_hidden_ND.dtype == torch.bfloat16
    found = loss_and_gradients(batch, backend.head_VD, kind)
    expected = loss_and_gradients(dense(backend, batch), None, kind)
    assert 0 < (found[0] - expected[0]).abs() < MOST_NOISE
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).norm() < 0.01 * other.norm()
    exact_NV = dense(backend, batch).teacher_logp_NV
    assert exact_NV is not None
    rounded_NV = head_logps(batch.teacher_hidden_ND, backend.head_VD, SPEC)
    assert (rounded_NV - exact_NV).abs().max() < 0.05


class LiveBytes(TorchDispatchMode):
    """The largest tensor and the most bytes alive at once, of what is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return made

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.largest, self.peak = max(self.largest, size), max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_a_few_chunks_and_copies_of_the_head_however_many_tokens(
    kind: DivergenceKind,
) -> None:
    backend = TableBackend(torch.bfloat16)
    weight = randn(V, D, seed=4, spread=0.3).requires_grad_()
    loss, head, chunk = Divergence(DivergenceLossConfig(kind=kind)), V * D * 4, CHUNK * V * 4

    def step(tokens: int, cut: int) -> LiveBytes:
        batch = travelled(backend, DType.auto, tokens=tokens)
        hidden = randn(tokens, D, seed=3).requires_grad_()
        with LiveBytes() as seen:
            chunked_loss(
                hidden, weight, batch, loss, SPEC, teacher_head_VD=backend.head_VD, chunk=cut
            ).total.backward()
        weight.grad = None
        return seen

    few, many = step(32, CHUNK), step(128, CHUNK)
    assert many.largest <= max(chunk, head), "no [tokens, vocabulary] matrix"
    assert many.peak <= 4.2 * head + 12 * chunk
    assert many.peak - few.peak < chunk, "96 tokens more would be 24 chunks more"
    assert step(128, 128).largest >= 128 * V * 4, "the probe sees a whole matrix"
