"""Every loss x support x weighting x correction x clip against dense float64, value and gradient.

Losses are float32: they agree to 1e-5, of the value and of the gradient's largest component.
"""

import itertools
from dataclasses import replace

import pytest
import torch

from opd.batch import Batch
from opd.config.loss import (
    DivergenceLossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.head import HeadSpec
from opd.interfaces import Loss
from opd.losses.divergence import Divergence
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.policy_gradient import PolicyGradient
from opd.losses.with_reward import WithReward
from opd.train.chunked import chunked_loss
from opd.types import Correction, DivergenceKind, Surrogate
from tests.conformance import dense64
from tests.conformance.loss_cases import (
    CHOICES,
    KINDS,
    LENGTHS,
    SUPPORTS,
    N,
    V,
    case,
    logits,
    randn,
    teacher_logp,
    token_settings,
)

KINDS_AND_SUPPORTS = list(itertools.product(KINDS, SUPPORTS))


def divergence(kind: str, support: str, choice: dense64.Choice) -> Divergence:
    return Divergence(
        DivergenceLossConfig(
            kind=DivergenceKind(kind),
            support=Support(support),
            beta=0.3,
            skew=0.2,
            token_clip=choice.clip,
            **token_settings(choice),
        )
    )


def found(loss: Loss, batch: Batch, student: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = student.clone().requires_grad_()
    out = loss(leaf.log_softmax(-1), batch)
    assert all(value.isfinite() for value in out.sums.values())
    return out.total.detach(), torch.autograd.grad(out.total, leaf)[0]


def assert_agrees(
    ours: tuple[torch.Tensor, torch.Tensor], total: torch.Tensor, leaf: torch.Tensor
) -> None:
    (gradient,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(ours[0].double(), total.detach(), rtol=1e-5, atol=1e-5)
    most = float(gradient.abs().max())
    torch.testing.assert_close(ours[1].double(), gradient, rtol=0.0, atol=1e-5 * most + 1e-9)


@pytest.mark.parametrize(("kind", "support"), KINDS_AND_SUPPORTS)
def test_divergences_equal_the_reference(kind: str, support: str) -> None:
    batch, tokens = case(support)
    for choice in CHOICES:
        ours = found(divergence(kind, support, choice), batch, logits())
        leaf = logits().double().requires_grad_()
        assert_agrees(ours, dense64.divergence(kind, leaf, tokens, choice), leaf)


@pytest.mark.parametrize("surrogate", Surrogate)
@pytest.mark.parametrize(
    "parts", [(1.0, 0.0, 0.0), (0.7, 2.0, 0.0), (0.0, 1.0, 0.0), (0.0, 1.0, 0.3)]
)
def test_policy_gradients_equal_the_reference(
    surrogate: Surrogate, parts: tuple[float, float, float]
) -> None:
    teacher, reward, kl_coef = parts
    batch, tokens = case("teacher_top_k")
    for choice in CHOICES:
        loss = PolicyGradient(
            PolicyGradientLossConfig(
                surrogate=surrogate,
                teacher_weight=teacher,
                reward_weight=reward,
                kl_coef=kl_coef,
                clip_ratio_high=0.28,
                **token_settings(choice),
            )
        )
        leaf = logits().double().requires_grad_()
        total = dense64.policy(
            leaf,
            tokens,
            choice,
            surrogate=surrogate,
            teacher=teacher,
            reward=reward,
            kl_weight=kl_coef,
        )
        assert_agrees(found(loss, batch, logits()), total, leaf)


def test_likelihood_equals_the_reference() -> None:
    batch, tokens = case("full")
    for choice in CHOICES:
        loss = NegativeLogLikelihood(NllLossConfig(**token_settings(choice)))
        leaf = logits().double().requires_grad_()
        assert_agrees(found(loss, batch, logits()), dense64.nll(leaf, tokens, choice), leaf)


def test_a_reward_beside_a_divergence_equals_the_sum_of_both_references() -> None:
    batch, tokens = case("union")
    for choice in CHOICES:
        plain = replace(choice, weighting="uniform")
        loss = WithReward(
            loss=divergence("jsd", "union", choice),
            policy=PolicyGradient(
                PolicyGradientLossConfig(
                    teacher_weight=0.0,
                    reward_weight=0.4,
                    clip_ratio_high=0.28,
                    **token_settings(plain),
                )
            ),
        )
        leaf = logits().double().requires_grad_()
        total = dense64.divergence("jsd", leaf, tokens, choice) + dense64.policy(
            leaf, tokens, plain, surrogate="clip", teacher=0.0, reward=0.4
        )
        assert_agrees(found(loss, batch, logits()), total, leaf)


def test_metrics_do_not_depend_on_weights_or_clips() -> None:
    batch, tokens = case("union")
    for choice in CHOICES:
        loss = divergence("reverse_kl", "union", choice)
        sums = loss(logits().log_softmax(-1), batch).sums
        plain = dense64.Choice()
        even = replace(tokens, weight_N=torch.ones(N).double())
        expected = dense64.divergence("reverse_kl", logits().double(), even, plain)
        assert float(sums["loss/reverse_kl"]) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("kind", "support"), KINDS_AND_SUPPORTS)
def test_a_divergence_is_never_negative_by_more_than_rounding(kind: str, support: str) -> None:
    for distance in (2.0, 1e-1, 1e-3, 1e-5):
        teacher = (logits() + distance * randn(N, V, seed=9)).log_softmax(-1)
        batch, _ = case(support, teacher=teacher)
        loss = divergence(kind, support, dense64.Choice())
        for row in range(N):
            part = replace(batch.rows(row, row + 1), weight_N=None)
            value = float(loss(logits()[row : row + 1].log_softmax(-1), part).total)
            assert value >= -1e-6


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_all_is_finite_where_a_side_gives_no_probability(support: str, who: str) -> None:
    student, teacher = logits(), teacher_logp()
    if who != "teacher":
        student[:, 3:7] = -torch.inf
    if who != "student":
        teacher[:, 5:9] = -torch.inf
        teacher = teacher.log_softmax(-1)
    batch, _ = case(support, student=student, teacher=teacher)
    if who != "student":
        batch = replace(batch, teacher_logp_N=torch.full((N,), -torch.inf))
    if who != "teacher":
        batch = replace(batch, target_N=batch.target_N.index_fill(0, torch.arange(4), 3))
    for choice in CHOICES:
        tokens = token_settings(choice)
        for loss in (
            *(divergence(kind, support, choice) for kind in KINDS),
            *(
                PolicyGradient(PolicyGradientLossConfig(surrogate=s, kl_coef=0.1, **tokens))
                for s in Surrogate
            ),
            NegativeLogLikelihood(NllLossConfig(**tokens)),
        ):
            total, gradient = found(loss, batch, student)
            assert total.isfinite()
            assert gradient.isfinite().all()


@pytest.mark.parametrize(("kind", "support"), KINDS_AND_SUPPORTS)
def test_teacher_that_is_the_student_gives_exactly_nothing(kind: str, support: str) -> None:
    """An intersection folds the teacher's tail in another order: there nothing is 1e-6."""
    most = 1e-6 if support == "intersection" else 0.0
    batch, _ = case(support, teacher=logits().log_softmax(-1))
    for choice in CHOICES:
        loss = divergence(kind, support, choice)
        total, gradient = found(loss, batch, logits())
        assert abs(float(total)) <= most
        assert float(gradient.abs().max()) <= most


def test_the_batches_reach_every_branch() -> None:
    batch, tokens = case("intersection")
    assert tokens.inside_NV is not None
    sizes = tokens.inside_NV.sum(-1)
    assert sizes.min() < sizes.max()
    assert batch.engine_logp_N.isnan().sum() == LENGTHS[3]
    leaf = logits().double()
    for name in Correction:
        if name == Correction.none:
            continue
        weights = dense64.correction(leaf, tokens, dense64.Choice(correction=name))
        touched = (weights == 0.9) | (weights == 0.0)
        assert 0 < touched.sum() < N, name
    for support, kind in itertools.product(SUPPORTS, KINDS):
        batch, _ = case(support)
        sums = divergence(kind, support, dense64.Choice(clip=0.15))(
            logits().log_softmax(-1), batch
        ).sums
        if kind in ("forward_kl", "reverse_kl") and support != "intersection":
            assert 0 < float(sums["loss/kl_clip_share"]) < N


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_that_is_the_student_moves_neither_hidden_states_nor_head(kind: str) -> None:
    hidden, head = randn(N, 6, seed=10).requires_grad_(), randn(V, 6, seed=11).requires_grad_()
    batch, _ = case("full")
    same = replace(batch, teacher_logp_NV=None, teacher_hidden_ND=hidden.detach())
    for chunk in (3, N):
        out = chunked_loss(
            hidden,
            head,
            same,
            divergence(kind, "full", dense64.Choice()),
            HeadSpec(vocab_size=V),
            teacher_head_VD=head.detach(),
            chunk=chunk,
        )
        assert out.total == 0
        assert all((g == 0).all() for g in torch.autograd.grad(out.total, (hidden, head)))
