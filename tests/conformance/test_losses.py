"""Every loss against a dense float64 reference written in probabilities, and against theory."""

import itertools
import math
from typing import Any

import pytest
import torch

from opd.batch import Batch
from opd.config.loss import DivergenceLossConfig, PolicyGradientLossConfig
from opd.head import HeadSpec, head_logps
from opd.losses.divergence import Divergence
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.types import Correction, DivergenceKind, Surrogate

N, V, D = 9, 23, 5
FORWARD_KL, REVERSE_KL, JSD, SKEW_KL, SKEW_REVERSE_KL = (
    DivergenceKind.forward_kl,
    DivergenceKind.reverse_kl,
    DivergenceKind.jsd,
    DivergenceKind.skew_kl,
    DivergenceKind.skew_reverse_kl,
)


def divergence(kind: DivergenceKind, **settings: float) -> Divergence:
    return Divergence(DivergenceLossConfig(kind=kind, **settings))


DIVERGENCES = {
    "forward_kl": divergence(FORWARD_KL),
    "reverse_kl": divergence(REVERSE_KL),
    **{f"jsd {beta}": divergence(JSD, beta=beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0)},
    **{f"skew_kl {skew}": divergence(SKEW_KL, skew=skew) for skew in (0.0, 0.1, 0.7)},
    **{
        f"skew_reverse_kl {skew}": divergence(SKEW_REVERSE_KL, skew=skew)
        for skew in (0.0, 0.1, 0.7)
    },
}
every_divergence = pytest.mark.parametrize("loss", DIVERGENCES.values(), ids=DIVERGENCES)


def make_batch(tokens: int, **fields: torch.Tensor | None) -> Batch:
    ids_BT = torch.zeros(1, tokens + 1, dtype=torch.int64)
    return Batch(
        **{
            "input_ids_BT": ids_BT,
            "attention_mask_BT": torch.ones_like(ids_BT),
            "positions_N": torch.arange(tokens),
            "target_N": torch.zeros(tokens, dtype=torch.int64),
            "engine_logp_N": torch.zeros(tokens),
            **fields,
        }
    )


def plain(**settings: Any) -> PolicyGradient:
    """The surrogate without PPO's clip, times an importance weight where one is set."""
    return PolicyGradient(PolicyGradientLossConfig(surrogate=Surrogate.plain, **settings))


def student(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(N, D, generator=g).requires_grad_(),
        torch.randn(V, D, generator=g).requires_grad_(),
    )


def distribution(seed: int = 1, rows: int = N, width: int = V) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(rows, width, generator=g), dim=-1)


def truncated(teacher_logp_NV: torch.Tensor, ids_NK: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a teacher would send of its distribution: support, log-probs and tail."""
    logp_NK = teacher_logp_NV.gather(1, ids_NK.clamp(min=0)).masked_fill(ids_NK < 0, -torch.inf)
    tail_N = buckets64(teacher_logp_NV.double().exp(), ids_NK)[:, -1].log().float()
    return {"support_ids_NK": ids_NK, "support_logp_NK": logp_NK, "support_tail_N": tail_N}


def top_ids(logp_NV: torch.Tensor, k: int) -> torch.Tensor:
    return logp_NV.topk(k, dim=1).indices


def reference(loss: Divergence, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The formulas as printed, over float64 probabilities."""

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        safe = torch.where(a > 0, a, 1.0)
        return (a * (safe.log() - torch.where(a > 0, b, 1.0).log())).sum()

    beta, skew = loss.config.beta, loss.config.skew
    match loss.config.kind:
        case DivergenceKind.forward_kl:
            return kl(p, q)
        case DivergenceKind.reverse_kl:
            return kl(q, p)
        case DivergenceKind.jsd if beta in (0.0, 1.0):
            return kl(q, p) if beta else kl(p, q)
        case DivergenceKind.jsd:
            m = beta * p + (1 - beta) * q
            return beta * kl(p, m) + (1 - beta) * kl(q, m)
        case DivergenceKind.skew_kl:
            return kl(p, skew * p + (1 - skew) * q)
        case DivergenceKind.skew_reverse_kl:
            return kl(q, skew * q + (1 - skew) * p)


def value_and_gradients(total: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
    return [total.detach().double(), *[g.double() for g in torch.autograd.grad(total, inputs)]]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def buckets64(prob_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """Support and rest of each row, float64 probabilities, unused places zero."""
    rows = []
    for prob_V, ids_K in zip(prob_NV, ids_NK, strict=True):
        used = ids_K[ids_K >= 0]
        rest = torch.ones(len(prob_V), dtype=torch.bool)
        rest[used] = False
        unused = prob_V.new_zeros(len(ids_K) - len(used))
        rows.append(torch.cat([prob_V[used], unused, prob_V[rest].sum()[None]]))
    return torch.stack(rows)


@every_divergence
@pytest.mark.parametrize(
    "spec", [HeadSpec(vocab_size=V), HeadSpec(vocab_size=V, softcap=3.0, scale=0.7)], ids=str
)
def test_full_divergence_equals_the_float64_reference(loss: Divergence, spec: HeadSpec) -> None:
    hidden, weight = student()
    teacher = distribution()
    out = loss(head_logps(hidden, weight, spec, 1.3), make_batch(N, teacher_logp_NV=teacher))
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = h64 @ w64.T * spec.scale
    if spec.softcap:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    expected = reference(loss, torch.softmax(logits / 1.3, dim=1), teacher.double().exp())
    assert_close(
        value_and_gradients(out.total, hidden, weight), value_and_gradients(expected, h64, w64)
    )
    assert out.sums[f"loss/{loss.config.kind}"] == out.total.detach()


@every_divergence
def test_gradient_before_the_softmax_is_that_between_measures_of_any_size(
    loss: Divergence,
) -> None:
    logp, teacher = distribution(seed=5).requires_grad_(), distribution(seed=6)
    out = loss(logp, make_batch(N, teacher_logp_NV=teacher))
    logp64 = logp.detach().double().requires_grad_()
    q, p = logp64.exp(), teacher.double().exp()
    kind, skew = loss.config.kind, loss.config.skew
    by_size = {SKEW_KL: 1 - skew, SKEW_REVERSE_KL: skew - 1}.get(kind, 0.0)
    if kind in (FORWARD_KL, REVERSE_KL) or skew == 0.0:
        by_size = 1.0 if "reverse" not in kind else -1.0
    if kind == JSD:
        by_size = {0.0: 1.0, 1.0: -1.0}.get(loss.config.beta, 0.0)
    expected = reference(loss, q, p) + by_size * (q.sum() - p.sum())
    assert_close(value_and_gradients(out.total, logp), value_and_gradients(expected, logp64))


@every_divergence
@pytest.mark.parametrize("k", [1, 4, V - 1, V])
def test_truncated_divergence_equals_the_float64_reference(loss: Divergence, k: int) -> None:
    hidden, weight = student()
    teacher = distribution()
    ids = top_ids(teacher, k)
    if 1 < k < V:
        ids[::2, -1] = -1  # a ragged support
        ids[3] = -1  # a row with nothing but a tail
    out = loss(
        head_logps(hidden, weight, HeadSpec(vocab_size=V)), make_batch(N, **truncated(teacher, ids))
    )
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    q = buckets64(torch.softmax(h64 @ w64.T, dim=1), ids)
    p = buckets64(teacher.double().exp(), ids)
    assert_close(
        value_and_gradients(out.total, hidden, weight),
        value_and_gradients(reference(loss, q, p), h64, w64),
    )
    torch.testing.assert_close(
        [out.sums["loss/student_tail"].double(), out.sums["loss/teacher_tail"].double()],
        [q[:, -1].sum().detach(), p[:, -1].sum()],
        rtol=1e-5,
        atol=1e-6,
    )


@every_divergence
def test_more_support_never_lowers_the_divergence_and_all_of_it_is_the_full_one(
    loss: Divergence,
) -> None:
    logp, teacher = distribution(seed=5), distribution(seed=6)
    full = loss(logp, make_batch(N, teacher_logp_NV=teacher)).total
    chosen = top_ids(logp, V)  # nested supports, here of the student's choice
    values = [
        float(loss(logp, make_batch(N, **truncated(teacher, chosen[:, :k]))).total)
        for k in (1, 2, 5, 12, V)
    ]
    assert values[0] >= 0.0
    assert all(a <= b + 1e-5 for a, b in itertools.pairwise(values))
    assert values[0] < 0.9 * values[-1], "the inequality is not tested by equal numbers"
    assert values[-1] == pytest.approx(float(full), rel=1e-5)


@every_divergence
def test_divergence_of_equal_distributions_is_zero_with_zero_gradient(loss: Divergence) -> None:
    logits = distribution(seed=8).requires_grad_()
    teacher = logits.detach().log_softmax(1)
    for scores, most in (
        ({"teacher_logp_NV": teacher}, 0.0),
        (truncated(teacher, top_ids(teacher, 4)), 1e-6),  # its tail is added up in float64
    ):
        value, gradient = value_and_gradients(
            loss(logits.log_softmax(1), make_batch(N, **scores)).total, logits
        )
        assert abs(value) <= most
        assert gradient.abs().max() <= most


@pytest.mark.parametrize("gap", [5.0, 15.0, 25.0, 60.0])
def test_student_tail_is_exact_where_one_minus_the_sum_is_nothing(gap: float) -> None:
    logits = torch.zeros(1, V)
    logits[0, 3] = gap
    logp = logits.log_softmax(1).requires_grad_()
    scores = {
        "support_ids_NK": torch.tensor([[3]]),
        "support_logp_NK": torch.tensor([[math.log(0.25)]]),
        "support_tail_N": torch.tensor([math.log(0.75)]),
    }
    out = divergence(FORWARD_KL)(logp, make_batch(1, **scores))
    log_tail = math.log(V - 1) - math.log(math.exp(gap) + V - 1)
    log_head = gap - math.log(math.exp(gap) + V - 1)
    expected = 0.25 * (math.log(0.25) - log_head) + 0.75 * (math.log(0.75) - log_tail)
    assert float(out.total.detach()) == pytest.approx(expected, rel=1e-5)
    (gradient,) = torch.autograd.grad(out.total, logp)
    assert gradient[0, 3] == pytest.approx(math.exp(log_head) - 0.25)
    each = (math.exp(log_tail) - 0.75) / (V - 1)
    assert gradient[0, 0] == pytest.approx(each, rel=1e-5)


def test_sampled_reverse_kl_agrees_with_the_exact_one() -> None:
    q, p = distribution(seed=2, rows=1), distribution(seed=3, rows=1)
    exact = float(divergence(REVERSE_KL)(q, make_batch(1, teacher_logp_NV=p)).total)
    n = 200_000
    target = torch.multinomial(
        q[0].exp(), n, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    scores = {"target_N": target, "engine_logp_N": q[0, target], "teacher_logp_N": p[0, target]}
    sums = PolicyGradient()(q.expand(n, V), make_batch(n, **scores)).sums
    k1 = (q - p)[0, target]
    k3 = (-k1).expm1() + k1
    for name, samples in (("loss/reverse_kl_k1", k1), ("loss/reverse_kl_k3", k3)):
        assert abs(float(sums[name]) / n - exact) < 4 * float(samples.std()) / math.sqrt(n)
    assert float(sums["loss/reverse_kl_k2"]) == pytest.approx(float((k1**2).sum()) / 2, rel=1e-4)


@pytest.mark.parametrize(
    "loss",
    [
        PolicyGradient(),
        plain(),
        plain(correction=Correction.truncate),
        plain(correction=Correction.mask),
    ],
    ids=["clip", "plain", "truncate", "mask"],
)
def test_expected_policy_gradient_on_policy_is_the_gradient_of_exact_reverse_kl(
    loss: PolicyGradient,
) -> None:
    logits = distribution(seed=2, rows=1).requires_grad_()
    logp = logits.log_softmax(1)
    p = distribution(seed=3, rows=1)
    found = expected_gradient(loss, logits, logp[0].detach(), p)
    exact = divergence(REVERSE_KL)(logp, make_batch(1, teacher_logp_NV=p))
    assert_close([found], value_and_gradients(exact.total, logits)[1:])
    assert found.abs().max() > 0.01


@pytest.mark.parametrize(
    "loss",
    [
        plain(correction=Correction.truncate, correction_cap=1e9),
        plain(correction=Correction.mask, correction_min=0.0, correction_max=1e9),
    ],
    ids=["truncate", "mask"],
)
def test_importance_ratio_corrects_the_gradient_of_tokens_another_policy_wrote(
    loss: PolicyGradient,
) -> None:
    logits = distribution(seed=2, rows=1).requires_grad_()
    engine = distribution(seed=7, rows=1)[0]
    p = distribution(seed=3, rows=1)
    exact = divergence(REVERSE_KL)(logits.log_softmax(1), make_batch(1, teacher_logp_NV=p))
    expected = value_and_gradients(exact.total, logits)[1:]
    assert_close([expected_gradient(loss, logits, engine, p)], expected)
    gap = expected_gradient(plain(), logits, engine, p) - expected[0]
    assert gap.abs().max() > 0.01


def expected_gradient(
    loss: PolicyGradient, logits: torch.Tensor, engine_logp_V: torch.Tensor, p: torch.Tensor
) -> torch.Tensor:
    """Mean over every token y the engine may write, weighted by its probability."""
    rows = logits.log_softmax(1).expand(V, V)
    scores = {"target_N": torch.arange(V), "engine_logp_N": engine_logp_V, "teacher_logp_N": p[0]}
    (by_row,) = torch.autograd.grad(
        loss(rows, make_batch(V, **scores)).total, rows, retain_graph=True
    )
    (gradient,) = torch.autograd.grad(rows, logits, engine_logp_V.exp()[:, None] * by_row)
    return gradient.double()


def test_negative_log_likelihood_equals_cross_entropy() -> None:
    hidden, weight = student()
    target = torch.arange(N) % V
    out = NegativeLogLikelihood()(
        head_logps(hidden, weight, HeadSpec(vocab_size=V)), make_batch(N, target_N=target)
    )
    h64, w64 = (x.detach().double().requires_grad_() for x in (hidden, weight))
    expected = torch.nn.functional.cross_entropy(h64 @ w64.T, target, reduction="sum")
    assert_close(
        value_and_gradients(out.total, hidden, weight), value_and_gradients(expected, h64, w64)
    )
