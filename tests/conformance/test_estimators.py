"""Sampled estimators against exact divergences: 10^5 draws, a vocabulary of 50, three standard errors."""

import math

import pytest
import torch

from opd.batch import Batch
from opd.config.loss import DivergenceLossConfig, PolicyGradientLossConfig
from opd.losses.divergence import Divergence
from opd.losses.policy_gradient import PolicyGradient
from opd.types import DivergenceKind, Surrogate

DRAWS, V = 100_000, 50
GROUPS = torch.arange(V) % 5
REVERSE = Divergence(DivergenceLossConfig(kind=DivergenceKind.reverse_kl))


def randn(seed: int) -> torch.Tensor:
    return torch.randn(1, V, generator=torch.Generator().manual_seed(seed))


LOGITS = randn(0)
TEACHER = (LOGITS + 0.7 * randn(1)).log_softmax(-1)


def drawn() -> Batch:
    """What the student wrote, scored by the teacher."""
    student = LOGITS.log_softmax(-1)[0]
    target = torch.multinomial(
        student.exp(), DRAWS, replacement=True, generator=torch.Generator().manual_seed(2)
    )
    ids_BT = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=ids_BT,
        positions_N=target,
        target_N=target,
        engine_logp_N=student[target],
        teacher_logp_N=TEACHER[0, target],
    )


def exact() -> tuple[float, torch.Tensor]:
    """Reverse KL and its gradient by the logits, [V]."""
    leaf = LOGITS.clone().requires_grad_()
    batch = drawn().rows(0, 1)
    scored = Batch(
        input_ids_BT=batch.input_ids_BT,
        attention_mask_BT=batch.attention_mask_BT,
        positions_N=batch.positions_N,
        target_N=batch.target_N,
        engine_logp_N=batch.engine_logp_N,
        teacher_logp_NV=TEACHER,
    )
    total = REVERSE(leaf.log_softmax(-1), scored).total
    return float(total.detach()), torch.autograd.grad(total, leaf)[0][0]


def assert_means_agree(samples: torch.Tensor, expected: torch.Tensor) -> None:
    """The mean over the first dimension, within three of its standard errors."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    assert ((samples.mean(dim=0) - expected).abs() < 3 * error).all()
    assert (error > 0).all()


def grouped(gradient_NV: torch.Tensor) -> torch.Tensor:
    """Sums over five groups of ids, [N, 5]."""
    return torch.stack([gradient_NV[:, g == GROUPS].sum(-1) for g in range(5)], dim=-1)


def by_logits(gradient_NV: torch.Tensor) -> torch.Tensor:
    """Through the softmax: the gradient of each draw by the logits."""
    return gradient_NV - LOGITS.softmax(-1) * gradient_NV.sum(-1, keepdim=True)


def test_k1_and_k3_are_unbiased_estimates_of_reverse_kl() -> None:
    batch, (value, _) = drawn(), exact()
    q, p = LOGITS.log_softmax(-1)[0, batch.target_N], TEACHER[0, batch.target_N]
    samples = {"k1": q - p, "k3": (p - q).exp() - 1 - (p - q)}
    sums = PolicyGradient()(LOGITS.log_softmax(-1).expand(DRAWS, V), batch).sums
    for name, each in samples.items():
        assert_means_agree(each[:, None].double(), torch.tensor([value]))
        found = float(sums[f"loss/reverse_kl_{name}"])
        assert found / DRAWS == pytest.approx(float(each.double().mean()), rel=1e-4)
    assert value > 0.1


@pytest.mark.parametrize("surrogate", Surrogate)
def test_expected_gradient_of_the_policy_gradient_is_that_of_reverse_kl(
    surrogate: Surrogate,
) -> None:
    batch, (_, expected) = drawn(), exact()
    rows = LOGITS.log_softmax(-1).repeat(DRAWS, 1).requires_grad_()
    total = PolicyGradient(PolicyGradientLossConfig(surrogate=surrogate))(rows, batch).total
    each = by_logits(torch.autograd.grad(total, rows)[0])
    assert_means_agree(grouped(each.double()), grouped(expected[None])[0])
    assert grouped(expected[None]).abs().max() > 1e-2


def test_expected_gradient_of_k2_is_that_of_reverse_kl_and_that_of_k3_of_forward_kl() -> None:
    batch, (_, reverse) = drawn(), exact()
    forward = LOGITS.softmax(-1)[0] - TEACHER.exp()[0]
    rows = LOGITS.log_softmax(-1).repeat(DRAWS, 1).requires_grad_()
    gap = rows.gather(1, batch.target_N[:, None])[:, 0] - TEACHER[0, batch.target_N]
    k2 = by_logits(torch.autograd.grad(gap.square().sum() / 2, rows)[0])
    assert_means_agree(grouped(k2.double()), grouped(reverse[None])[0])
    k3 = PolicyGradient(PolicyGradientLossConfig(teacher_weight=0.0, kl_coef=1.0))(
        rows, batch
    ).total
    each = by_logits(torch.autograd.grad(k3, rows)[0])
    assert_means_agree(grouped(each.double()), grouped(forward[None])[0])
