"""The chunked loss against a dense float64 one, and against every other division of the batch."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opd.batch import Batch, LossOutput, collate
from opd.config.loss import DivergenceLossConfig, NllLossConfig, PolicyGradientLossConfig
from opd.head import HeadSpec, head_logps
from opd.interfaces import Loss
from opd.losses.divergence import Divergence
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.train.chunked import chunked_logps, chunked_loss
from opd.types import (
    DivergenceKind,
    FinishReason,
    Prompt,
    Rollout,
    ScoredRollout,
    SupportLogps,
    Surrogate,
)

N, V, D = 21, 29, 6
SPEC = HeadSpec(vocab_size=V)
REVERSE = Divergence(DivergenceLossConfig(kind=DivergenceKind.reverse_kl))
LOSSES: dict[str, Loss] = {
    **{kind.value: Divergence(DivergenceLossConfig(kind=kind)) for kind in DivergenceKind},
    **{
        f"policy_gradient_{surrogate}": PolicyGradient(
            PolicyGradientLossConfig(surrogate=surrogate, clip_ratio_high=0.2)
        )
        for surrogate in Surrogate
    },
    "nll": NegativeLogLikelihood(NllLossConfig()),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight = randn(N, D, seed=0).to(dtype), randn(V, D, seed=1).to(dtype)
    return hidden.requires_grad_(), weight.requires_grad_()


def make_batch(**fields: torch.Tensor | None) -> Batch:
    ids_BT = torch.zeros(1, N + 1, dtype=torch.int64)
    teacher = (2 * randn(N, V, seed=2)).log_softmax(1)
    target = torch.arange(N) % V
    made = {
        "input_ids_BT": ids_BT,
        "attention_mask_BT": torch.ones_like(ids_BT),
        "positions_N": torch.arange(N),
        "target_N": target,
        "engine_logp_N": head_logps(*student(), SPEC).detach()[torch.arange(N), target]
        + 0.3 * randn(N, seed=3),
        "teacher_logp_N": teacher[torch.arange(N), target],
        "teacher_logp_NV": teacher,
    }
    return Batch(**{**made, **fields})


def truncated(batch: Batch, k: int) -> Batch:
    assert batch.teacher_logp_NV is not None
    logp_NK, ids_NK = batch.teacher_logp_NV.topk(k, dim=1)
    tail_N = torch.log1p(-logp_NK.exp().sum(1))
    return replace(
        batch,
        teacher_logp_NV=None,
        support_ids_NK=ids_NK,
        support_logp_NK=logp_NK,
        support_tail_N=tail_N,
    )


def in_float64(batch: Batch, spec: HeadSpec) -> Batch:
    """The same batch over the ids that the student has."""
    wide = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    doubled = {k: x.double() for k, x in wide.items() if x is not None and x.is_floating_point()}
    if batch.teacher_logp_NV is not None:
        doubled["teacher_logp_NV"] = doubled["teacher_logp_NV"][:, : spec.vocab_size]
    return replace(batch, **doubled)


def gradients(out: LossOutput, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out.total, inputs))


def numbers(out: LossOutput) -> dict[str, float]:
    assert not any(x.requires_grad for x in (*out.sums.values(), *out.maxima.values()))
    return {name: float(x) for name, x in (out.sums | out.maxima).items()}


@every_loss
@pytest.mark.parametrize(
    ("spec", "temperature"),
    [(SPEC, 1.0), (HeadSpec(vocab_size=V - 3, softcap=3.0, scale=0.7), 1.3)],
    ids=str,
)
def test_value_and_gradients_equal_the_dense_loss_in_float64(
    loss: Loss, spec: HeadSpec, temperature: float
) -> None:
    hidden, weight = student()
    for batch in (make_batch(), truncated(make_batch(), 5)):
        h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
        logits = (h64 @ w64.T)[:, : spec.vocab_size] * spec.scale
        if spec.softcap:
            logits = spec.softcap * torch.tanh(logits / spec.softcap)
        dense = loss(torch.log_softmax(logits / temperature, dim=1), in_float64(batch, spec))
        out = chunked_loss(hidden, weight, batch, loss, spec, temperature=temperature, chunk=4)
        torch.testing.assert_close(out.total.double(), dense.total.double(), rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients(out, hidden, weight), gradients(dense, h64, w64), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@every_loss
def test_nothing_depends_on_the_chunk(loss: Loss) -> None:
    hidden, weight = student()
    for batch in (make_batch(), truncated(make_batch(), 5)):
        whole = chunked_loss(hidden, weight, batch, loss, SPEC)
        expected = gradients(whole, hidden, weight)
        for chunk in (1, 2, 7, N):
            out = chunked_loss(hidden, weight, batch, loss, SPEC, chunk=chunk)
            assert numbers(out) == pytest.approx(numbers(whole), rel=1e-5, abs=1e-5)
            torch.testing.assert_close(out.total, whole.total)
            torch.testing.assert_close(gradients(out, hidden, weight), expected)


def scored(lengths: list[tuple[int, int]]) -> list[ScoredRollout]:
    """One rollout for each (prompt length, completion length), scored every way at once."""
    rng = np.random.default_rng(0)
    out = []
    for number, (before, after) in enumerate(lengths):
        full = (2 * randn(after, V, seed=10 + number)).log_softmax(1).numpy()
        tokens = rng.integers(0, V, after).astype(np.int32)
        ids = np.argsort(-full, axis=1)[:, :4].astype(np.int32)
        logps = np.take_along_axis(full, ids.astype(np.int64), axis=1)
        prompt = Prompt(uid=str(number), token_ids=rng.integers(0, V, before).astype(np.int32))
        out.append(
            ScoredRollout(
                rollout=Rollout(
                    prompt=prompt,
                    token_ids=tokens,
                    logps=(full[np.arange(after), tokens] - 0.2).astype(np.float32),
                    finish_reason=FinishReason.stop,
                    version=0,
                ),
                logps=full[np.arange(after), tokens],
                support=SupportLogps(
                    ids=ids, logps=logps, tail_logp=np.log1p(-np.exp(logps).sum(1))
                ),
                full_logps=full,
            )
        )
    return out


def tiny_student() -> torch.nn.ParameterDict:
    """Hidden states that look at a token and the one before it."""
    return torch.nn.ParameterDict(
        {"embed": randn(V, D, seed=4), "mix": randn(D, D, seed=5), "head": randn(V, D, seed=6)}
    )


def sums_and_gradients(
    groups: list[list[ScoredRollout]], loss: Loss, full: bool
) -> list[torch.Tensor]:
    """Total and parameter gradients, added up over micro-batches."""
    weights = tiny_student()
    total = torch.zeros(())
    for group in groups:
        batch = collate(group, pad_id=0, discount=0.5)
        if not full:
            batch = replace(batch, teacher_logp_NV=None)
        x_BTD = weights["embed"][batch.input_ids_BT]
        before_BTD = torch.nn.functional.pad(x_BTD, (0, 0, 1, 0))[:, :-1]
        hidden_BTD = torch.tanh(x_BTD + before_BTD @ weights["mix"])
        hidden_ND = hidden_BTD.flatten(0, 1)[batch.positions_N]
        out = chunked_loss(hidden_ND, weights["head"], batch, loss, SPEC, chunk=5)
        out.total.backward()
        total += out.total.detach()
    return [total, *[p.grad for p in weights.values() if p.grad is not None]]


LENGTHS = [(2, 9), (3, 1), (5, 4), (2, 2), (4, 7), (2, 5), (3, 3), (6, 6)]


@every_loss
@pytest.mark.parametrize("full", [True, False], ids=["full", "top-k"])
def test_nothing_depends_on_micro_batches_nor_on_padding(loss: Loss, full: bool) -> None:
    items = scored(LENGTHS)
    whole = sums_and_gradients([items], loss, full)
    assert len(whole) == 4
    for parts in (2, 4, len(items)):  # the last: one sequence each, so no padding at all
        size = len(items) // parts
        groups = [items[i : i + size] for i in range(0, len(items), size)]
        torch.testing.assert_close(
            sums_and_gradients(groups, loss, full), whole, rtol=1e-4, atol=1e-4
        )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return made


@every_loss
def test_no_tensor_of_tokens_times_vocabulary_is_made(loss: Loss) -> None:
    hidden, weight = student()
    batch = truncated(make_batch(), 5)
    largest = []
    for chunk in (2, N):
        with Largest() as mode:
            chunked_loss(hidden, weight, batch, loss, SPEC, chunk=chunk).total.backward()
        largest.append(mode.numel)
    assert largest[0] == V * D, "nothing larger than the matrix's own gradient"
    assert largest[1] >= N * V, "the probe sees the whole when it is there"


def test_a_matrix_of_many_blocks_gives_what_one_block_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = student(dtype)
        one = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC)
        expected = gradients(one, hidden, weight)
        with monkeypatch.context() as patch:
            patch.setattr("opd.head.CHUNK_BYTES", 4 * 4 * D * 5)  # blocks of five rows
            many = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC)
        torch.testing.assert_close(many.total, one.total)
        torch.testing.assert_close(gradients(many, hidden, weight), expected)


def test_tied_weight_gets_both_gradients() -> None:
    ids = torch.arange(N) % 11

    def tied(run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        weight = randn(V, D, seed=1).requires_grad_()
        run(torch.tanh(weight[ids]), weight).backward()
        assert weight.grad is not None
        return weight.grad

    batch = make_batch()
    found = tied(lambda h, w: chunked_loss(h, w, batch, REVERSE, SPEC, chunk=4).total)
    dense = tied(lambda h, w: REVERSE(head_logps(h, w, SPEC), batch).total)
    torch.testing.assert_close(found, dense)


def test_weight_made_by_an_autograd_function_passes_its_gradient_on() -> None:
    hidden, weight = student()
    kept = torch.arange(0, V * D, 7)

    class Place(torch.autograd.Function):
        """A dense weight whose gradient goes to kept coordinates, as the mask does it."""

        @staticmethod
        def forward(ctx: Any, values: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
            return dense

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return gradient.flatten()[kept], None

    frozen = weight.detach()
    values = frozen.flatten()[kept].clone().requires_grad_()
    out = chunked_loss(hidden.detach(), Place.apply(values, frozen), make_batch(), REVERSE, SPEC)
    (found,) = gradients(out, values)
    (dense,) = gradients(chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC), weight)
    assert torch.equal(found, dense.flatten()[kept])


def test_only_what_requires_a_gradient_gets_one() -> None:
    hidden, weight = student()
    both = gradients(chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC), hidden, weight)
    alone = chunked_loss(hidden, weight.detach(), make_batch(), REVERSE, SPEC)
    assert torch.equal(gradients(alone, hidden)[0], both[0])
    alone = chunked_loss(hidden.detach(), weight, make_batch(), REVERSE, SPEC)
    assert torch.equal(gradients(alone, weight)[0], both[1])
    frozen = chunked_loss(hidden.detach(), weight.detach(), make_batch(), REVERSE, SPEC)
    assert not frozen.total.requires_grad


def test_without_gradients_values_and_metrics_are_the_same() -> None:
    hidden, weight = student()
    trained = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC, chunk=4)
    with torch.no_grad():
        measured = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC, chunk=4)
    assert not measured.total.requires_grad
    assert torch.equal(measured.total, trained.total.detach())
    assert numbers(measured) == numbers(trained)


def test_the_upstream_gradient_scales_ours() -> None:
    hidden, weight = student()
    plain = gradients(chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC), hidden, weight)
    scaled = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC).total / 8
    for a, b in zip(torch.autograd.grad(scaled, (hidden, weight)), plain, strict=True):
        assert torch.equal(a, b / 8)


def test_a_second_backward_pass_is_refused_rather_than_wrong() -> None:
    hidden, weight = student()
    total = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@every_loss
def test_an_empty_micro_batch_is_zero_connected_and_names_every_metric(loss: Loss) -> None:
    hidden, weight = student()
    for batch in (make_batch(), truncated(make_batch(), 5)):
        some = chunked_loss(hidden, weight, batch, loss, SPEC)
        none = chunked_loss(hidden[:0], weight, batch.rows(0, 0), loss, SPEC)
        assert none.total == 0
        assert [float(g.abs().sum()) for g in gradients(none, hidden, weight)] == [0.0, 0.0]
        assert numbers(none) == dict.fromkeys(numbers(some), 0.0)


def test_teacher_hidden_states_give_what_its_full_distribution_gives() -> None:
    hidden, weight = student()
    teacher_hidden, teacher_head = randn(N, 9, seed=7), randn(V + 3, 9, seed=8)
    cap = HeadSpec(vocab_size=V + 3, softcap=4.0)
    full = head_logps(teacher_hidden, teacher_head, replace(cap, vocab_size=V), 0.7)
    batch = make_batch(teacher_logp_NV=full)
    expected = chunked_loss(hidden, weight, batch, REVERSE, SPEC, temperature=0.7)
    out = chunked_loss(
        hidden,
        weight,
        make_batch(teacher_logp_NV=None, teacher_hidden_ND=teacher_hidden),
        REVERSE,
        SPEC,
        temperature=0.7,
        teacher_head_VD=teacher_head,
        teacher_spec=cap,
        chunk=4,
    )
    torch.testing.assert_close(out.total, expected.total)
    torch.testing.assert_close(gradients(out, hidden, weight), gradients(expected, hidden, weight))


def test_a_teacher_of_fewer_ids_is_refused() -> None:
    hidden, weight = student()
    short = make_batch(teacher_logp_NV=torch.zeros(N, V - 1))
    with pytest.raises(ValueError, match=f"{V - 1} ids and the student's {V}"):
        chunked_loss(hidden, weight, short, REVERSE, SPEC)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_operands_still_give_float32_log_probs(autocast: bool) -> None:
    hidden, weight = student(torch.bfloat16)
    batch = make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = chunked_loss(hidden, weight, batch, REVERSE, SPEC, chunk=4)
        logps = chunked_logps(hidden, weight, batch.target_N, SPEC, chunk=4)
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    dense_logp = torch.log_softmax(h64 @ w64.T, dim=1)
    dense = REVERSE(dense_logp, batch)
    assert out.total.dtype == logps.dtype == torch.float32
    torch.testing.assert_close(out.total.double(), dense.total.double(), rtol=1e-5, atol=1e-5)
    expected = dense_logp.detach()[torch.arange(N), batch.target_N]
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(out, hidden, weight), gradients(dense, h64, w64), strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b.to(torch.bfloat16).double(), rtol=8e-3, atol=1e-5)


def test_float32_operands_are_not_lowered_by_autocast() -> None:
    hidden, weight = student()
    plain = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = chunked_loss(hidden, weight, make_batch(), REVERSE, SPEC)
    assert torch.equal(cast.total, plain.total)
    for a, b in zip(gradients(cast, hidden, weight), gradients(plain, hidden, weight), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_chunked_log_probs_are_those_of_the_targets(chunk: int | None) -> None:
    hidden, weight = student()
    target = make_batch().target_N
    logps = chunked_logps(hidden, weight, target, SPEC, 1.3, chunk)
    assert not logps.requires_grad
    expected = head_logps(hidden, weight, SPEC, 1.3)[torch.arange(N), target].detach()
    torch.testing.assert_close(logps, expected)
    assert chunked_logps(hidden[:0], weight, target[:0], SPEC).shape == (0,)
