"""The loss over two vocabularies: float64 references, autograd's gradients, ULD's and GOLD's own cases."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div, pad

from opd.batch import Batch
from opd.config.uld import UldLossConfig, Unmatched
from opd.head import HeadSpec
from opd.losses.uld import UniversalLogitDistillation, sorted_distance
from opd.spans import CommonVocabulary
from opd.teacher.alignment import Span
from opd.teacher.own_tokenizer import span_rows
from opd.train.chunked import chunked_loss
from opd.types import DivergenceKind

V, W, D, TOKENS = 13, 17, 5, 40
COMMON = CommonVocabulary(
    student_ids=np.array([0, 2, 3, 5, 8, 9, 12], np.int32),
    teacher_ids=np.array([4, 0, 1, 16, 7, 2, 3], np.int32),
    student_buckets=np.array([0, 7, 1, 2, 2, 3, 7, 0, 4, 5, 5, 5, 6], np.int32),
    teacher_buckets=np.array([1, 2, 5, 6, 0, 7, 7, 4, 4, 4, 0, 1, 2, 3, 7, 7, 3], np.int32),
)


def spans_of(rng: random.Random, tokens: int) -> list[Span]:
    """Spans of one or more tokens on each side; most are single, as with two BPEs."""
    spans, t, u = [], 0, 0
    while t < tokens:
        own = min(rng.choice([1, 1, 1, 2, 3]), tokens - t)
        other = rng.choice([1, 1, 1, 2])
        spans.append(Span(t, t + own, u, u + other))
        t, u = t + own, u + other
    return spans


def batch_of(seed: int = 0, tokens: int = TOKENS) -> Batch:
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    spans = spans_of(rng, tokens)
    count = spans[-1].teacher_end
    ids = torch.randint(0, W, (count,), generator=generator).numpy().astype(np.int32)
    logits = 2 * torch.randn(count, W, generator=generator)
    logp = torch.log_softmax(logits, dim=-1)
    own = logp.gather(1, torch.from_numpy(ids).long()[:, None])[:, 0].numpy()
    rows = span_rows(spans, ids, own)
    rows.ids[-1] = -1  # not compared
    placed = torch.zeros(tokens, W)
    for span in spans:
        placed[span.student_end - 1] = logp[span.teacher_end - 1]
    return Batch(
        input_ids_BT=torch.zeros(1, tokens, dtype=torch.long),
        attention_mask_BT=torch.ones(1, tokens, dtype=torch.long),
        positions_N=torch.arange(tokens),
        target_N=torch.randint(0, V, (tokens,), generator=generator),
        engine_logp_N=torch.full((tokens,), torch.nan),
        weight_N=torch.rand(tokens, generator=generator),
        teacher_logp_NV=placed,
        span_N=torch.from_numpy(rows.ids).long(),
        span_target_N=torch.from_numpy(rows.targets).long(),
        span_logp_N=torch.from_numpy(rows.logps),
        span_single_N=torch.from_numpy(rows.single),
    )


def divergence(kind: DivergenceKind, q: torch.Tensor, p: torch.Tensor, *, beta: float, skew: float):
    """Generalised to measures that do not sum to one, from its definition."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a / b).log() - a + b).sum()

    match kind:
        case DivergenceKind.forward_kl:
            return kl(p, q)
        case DivergenceKind.reverse_kl:
            return kl(q, p)
        case DivergenceKind.jsd if beta in (0.0, 1.0):  # by convention forward and reverse KL
            return kl(p, q) if beta == 0.0 else kl(q, p)
        case DivergenceKind.jsd:
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case DivergenceKind.skew_kl:
            return kl(p, skew * p + (1 - skew) * q)
        case DivergenceKind.skew_reverse_kl:
            return kl(q, skew * q + (1 - skew) * p)


def bucketed(p: torch.Tensor, buckets: np.ndarray) -> torch.Tensor:
    return torch.stack([p[[v for v in range(len(p)) if buckets[v] == m]].sum() for m in range(8)])


def reference(logp_NV: torch.Tensor, batch: Batch, config: UldLossConfig) -> torch.Tensor:
    """One span after the other in float64, by the chain rule; gradients by autograd."""
    total = logp_NV.new_zeros(())
    for number in sorted(set(batch.span_N.tolist()) - {-1}):
        rows = (batch.span_N == number).nonzero()[:, 0].tolist()
        *earlier, end = rows
        before = sum(logp_NV[row, batch.target_N[row]] for row in earlier)
        q = (logp_NV[end] + before).exp()
        p = (batch.teacher_logp_NV[end].double() + batch.span_logp_N[end].double()).exp()
        own, other = [int(batch.target_N[end])], [int(batch.span_target_N[end])]
        if config.unmatched == Unmatched.prefix:
            if batch.span_single_N[end]:
                q, p = bucketed(q, COMMON.student_buckets), bucketed(p, COMMON.teacher_buckets)
            else:
                q = torch.stack([q[own[0]], 1 - q[own[0]]])
                p = torch.stack([p[other[0]], 1 - p[other[0]]])
            value = divergence(config.kind, q, p, beta=config.beta, skew=config.skew)
            total = total + batch.weight_N[end].double() * config.matched_weight * value
            continue
        if batch.span_single_N[end]:
            own, other = COMMON.student_ids.tolist(), COMMON.teacher_ids.tolist()
        matched = divergence(config.kind, q[own], p[other], beta=config.beta, skew=config.skew)
        rest_q = q[[v for v in range(V) if v not in own]].sort(descending=True).values
        rest_p = p[[v for v in range(W) if v not in other]].sort(descending=True).values
        width = max(len(rest_q), len(rest_p))
        gap = pad(rest_q, (0, width - len(rest_q))) - pad(rest_p, (0, width - len(rest_p)))
        value = config.matched_weight * matched + config.unmatched_weight * gap.abs().sum()
        total = total + batch.weight_N[end].double() * value
    return total


@pytest.mark.parametrize("unmatched", list(Unmatched))
@pytest.mark.parametrize("kind", list(DivergenceKind))
@pytest.mark.parametrize(("beta", "skew"), [(0.5, 0.1), (0.0, 0.0), (1.0, 0.4)])
def test_values_and_gradients_are_those_of_a_float64_reference(
    kind: DivergenceKind, beta: float, skew: float, unmatched: Unmatched
) -> None:
    batch = batch_of()
    config = UldLossConfig(
        kind=kind,
        beta=beta,
        skew=skew,
        unmatched=unmatched,
        matched_weight=0.7,
        unmatched_weight=1.3,
    )
    logits = 2 * torch.randn(TOKENS, V, generator=torch.Generator().manual_seed(5))
    exact = logits.double().requires_grad_()
    expected = reference(torch.log_softmax(exact, dim=-1), batch, config)
    (gradient,) = torch.autograd.grad(expected, exact)
    leaf = logits.clone().requires_grad_()
    out = UniversalLogitDistillation(COMMON, config)(torch.log_softmax(leaf, dim=-1), batch)
    (found,) = torch.autograd.grad(out.total, leaf)
    assert out.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found.double() - gradient).abs().max() < 1e-6
    assert gradient.abs().max() > 1e-2


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("as_hidden", [False, True])
@pytest.mark.parametrize("unmatched", list(Unmatched))
def test_the_loss_does_not_depend_on_chunks_which_hold_whole_spans(
    chunk: int, as_hidden: bool, unmatched: Unmatched
) -> None:
    generator = torch.Generator().manual_seed(1)
    batch, hidden = batch_of(1), torch.randn(TOKENS, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    head = None
    if as_hidden:
        head = torch.randn(W, D, generator=generator)
        batch = replace(
            batch,
            teacher_logp_NV=None,
            teacher_hidden_ND=torch.randn(TOKENS, D, generator=generator),
        )
    logits = (hidden @ weight.T).double().requires_grad_()
    teacher = batch.teacher_logp_NV
    if head is not None:
        teacher = torch.log_softmax(batch.teacher_hidden_ND @ head.T, dim=-1)
    config = UldLossConfig(unmatched=unmatched)
    expected = reference(
        torch.log_softmax(logits, dim=-1), replace(batch, teacher_logp_NV=teacher), config
    )
    (gradient,) = torch.autograd.grad(expected, logits)
    leaf = hidden.clone().requires_grad_()
    out = chunked_loss(
        leaf,
        weight,
        batch,
        UniversalLogitDistillation(COMMON, config),
        HeadSpec(vocab_size=V),
        teacher_head_VD=head,
        chunk=chunk,
    )
    (found,) = torch.autograd.grad(out.total, leaf)
    assert out.total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found - gradient.float() @ weight).abs().max() < 1e-4
    assert float(out.sums["loss/uld_span_share"]) == len(set(batch.span_N.tolist()) - {-1})
    assert float(out.sums["loss/uld_compared_share"]) == int((batch.span_N >= 0).sum())


def test_a_batch_without_tokens_has_the_same_metrics_and_no_loss() -> None:
    leaf = torch.zeros(0, D, requires_grad=True)
    loss = UniversalLogitDistillation(COMMON)
    spec = HeadSpec(vocab_size=V)
    empty = chunked_loss(leaf, torch.zeros(V, D), batch_of().rows(0, 0), loss, spec)
    full = chunked_loss(torch.randn(TOKENS, D), torch.zeros(V, D), batch_of(), loss, spec)
    assert float(empty.total.detach()) == 0.0
    assert set(empty.sums) == set(full.sums)


@pytest.mark.parametrize("unmatched", list(Unmatched))
@pytest.mark.parametrize("kind", list(DivergenceKind))
def test_one_vocabulary_and_one_distribution_give_exactly_nothing(
    kind: DivergenceKind, unmatched: Unmatched
) -> None:
    logp = torch.log_softmax(3 * torch.randn(TOKENS, V), dim=-1)
    target = torch.randint(0, V, (TOKENS,))
    batch = replace(
        batch_of(),
        target_N=target,
        teacher_logp_NV=logp,
        span_N=torch.arange(TOKENS),
        span_target_N=target,
        span_logp_N=torch.zeros(TOKENS),
        span_single_N=torch.ones(TOKENS, dtype=torch.bool),
    )
    leaf = logp.clone().requires_grad_()
    config = UldLossConfig(kind=kind, unmatched=unmatched)
    out = UniversalLogitDistillation(CommonVocabulary.identical(V), config)(leaf, batch)
    (gradient,) = torch.autograd.grad(out.total, leaf)
    assert out.total.item() == 0.0
    assert gradient.abs().max() == 0.0


def test_the_sorted_part_alone_is_the_published_uld() -> None:
    # both sides sorted, the shorter one continued with zeros, summed differences: no pair of ids counts
    q = torch.tensor([[0.1, 0.7, 0.2]])
    p = torch.tensor([[0.05, 0.6, 0.05, 0.3]])
    value, slope = sorted_distance(q, p)
    assert value.item() == pytest.approx(0.1 + 0.1 + 0.05 + 0.05)
    assert slope.tolist() == [[1.0, 1.0, -1.0]]
    same, flat = sorted_distance(q, q[:, [2, 0, 1]])
    assert (same.item(), flat.abs().max().item()) == (0.0, 0.0)


def gold_hybrid(
    q: torch.Tensor, p: torch.Tensor, *, beta: float, weights: tuple[float, float]
) -> torch.Tensor:
    """GOLD's loss of one aligned position, as its trainer defines it, written anew: the divergence of the
    common ids' probabilities without a mass term, and the sorted difference of all others."""
    own, other = COMMON.student_ids.tolist(), COMMON.teacher_ids.tolist()
    s, t = q[own].log(), p[other].log()
    if beta == 0.0:
        matched = kl_div(s, t, reduction="sum", log_target=True)
    elif beta == 1.0:
        matched = kl_div(t, s, reduction="sum", log_target=True)
    else:
        m = ((1 - beta) * q[own] + beta * p[other]).log()
        matched = beta * kl_div(m, t, reduction="sum", log_target=True)
        matched += (1 - beta) * kl_div(m, s, reduction="sum", log_target=True)
    rest_q = q[[v for v in range(V) if v not in own]].sort(descending=True).values
    rest_p = p[[v for v in range(W) if v not in other]].sort(descending=True).values
    rest_q = pad(rest_q, (0, len(rest_p) - len(rest_q)))
    return weights[0] * matched + weights[1] * (rest_q - rest_p).abs().sum()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("weights", [(0.6, 0.4), (0.5, 0.5), (0.0, 1.0)])
def test_a_span_of_one_token_on_both_sides_has_golds_hybrid_loss(
    beta: float, weights: tuple[float, float]
) -> None:
    batch = batch_of()
    single = batch.span_single_N & (batch.span_N >= 0)
    batch = replace(
        batch, span_N=batch.span_N.masked_fill(~single, -1), weight_N=torch.ones(TOKENS)
    )
    logp = torch.log_softmax(torch.randn(TOKENS, V), dim=-1)
    config = UldLossConfig(
        kind=DivergenceKind.jsd, beta=beta, matched_weight=weights[0], unmatched_weight=weights[1]
    )
    out = UniversalLogitDistillation(COMMON, config)(logp, batch)
    ends = single.nonzero()[:, 0].tolist()
    q, p = logp.double().exp(), batch.teacher_logp_NV.double().exp()
    expected = sum(gold_hybrid(q[n], p[n], beta=beta, weights=weights) for n in ends)
    # the mass that either side has outside the common ids, which a KL of measures counts and GOLD does not
    mass = sum(q[n, COMMON.student_ids].sum() - p[n, COMMON.teacher_ids].sum() for n in ends)
    expected += weights[0] * {0.0: 1.0, 1.0: -1.0}.get(beta, 0.0) * mass
    assert len(ends) > 5
    assert out.total.item() == pytest.approx(float(expected), rel=1e-5)


def test_probabilities_of_a_longer_span_multiply() -> None:
    # GOLD's case of two rows: the tokens before the last one are factors, the last one's row remains
    logp = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]]).log()
    ids = np.array([0, 1], np.int32)
    rows = span_rows([Span(0, 2, 0, 2)], ids, logp[[0, 1], [0, 1]].numpy())
    batch = replace(
        batch_of(tokens=2),
        target_N=torch.tensor([0, 1]),
        weight_N=None,
        teacher_logp_NV=logp,
        span_N=torch.from_numpy(rows.ids).long(),
        span_target_N=torch.from_numpy(rows.targets).long(),
        span_logp_N=torch.from_numpy(rows.logps),
        span_single_N=torch.from_numpy(rows.single),
    )
    student = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]).log()
    config = UldLossConfig(kind=DivergenceKind.reverse_kl)
    out = UniversalLogitDistillation(CommonVocabulary.identical(3), config)(student, batch)
    q, p = 0.5 * torch.tensor([0.1, 0.8, 0.1]), 0.6 * torch.tensor([0.2, 0.5, 0.3])
    matched = q[1] * (q[1] / p[1]).log() - q[1] + p[1]
    unmatched = (0.18 - q[0]).abs() + (0.12 - q[2]).abs()
    assert out.sums["loss/uld_matched"].item() == pytest.approx(matched.item(), rel=1e-5)
    assert out.sums["loss/uld_unmatched"].item() == pytest.approx(unmatched.item(), rel=1e-5)
