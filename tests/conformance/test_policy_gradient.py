"""Each surrogate and correction by hand, and what is counted as touched."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opd.batch import Batch
from opd.config.loss import CHOICES, PolicyGradientLossConfig
from opd.losses.mismatch import mismatch_metrics
from opd.losses.policy_gradient import PolicyGradient
from opd.types import Correction, Surrogate

# Two ids; the target is id 0 with probability 1/2 under the learner, in every row.
LOGP = math.log(0.5)


def run(
    loss: PolicyGradient,
    ratios: list[float],
    gains: list[float],
    future: list[float] | None = None,
    reward: list[float] | None = None,
) -> tuple[dict[str, float], torch.Tensor]:
    """Metrics, and d total / d log q(target) per token, for given q / engine and log p - log q."""
    tokens = len(ratios)
    logp_NV = torch.full((tokens, 2), LOGP, requires_grad=True)
    ids_BT = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=ids_BT,
        positions_N=torch.arange(tokens),
        target_N=torch.zeros(tokens, dtype=torch.int64),
        engine_logp_N=LOGP - torch.tensor(ratios).log(),
        teacher_logp_N=LOGP + torch.tensor(gains) if gains else None,
        future_N=None if future is None else torch.tensor(future),
        advantage_N=None if reward is None else torch.tensor(reward),
    )
    out = loss(logp_NV, batch)
    (gradient,) = torch.autograd.grad(out.total, logp_NV)
    assert (gradient[:, 1] == 0).all()
    return {name: float(value) for name, value in out.sums.items()}, gradient[:, 0]


RATIOS = [0.5, 0.9, 1.0, 1.1, 3.0, 0.5, 1.0, 3.0]
GAINS = [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]


def policy_gradient(**settings: Any) -> PolicyGradient:
    return PolicyGradient(PolicyGradientLossConfig(**settings))


def plain(**settings: Any) -> PolicyGradient:
    return policy_gradient(surrogate=Surrogate.plain, **settings)


@pytest.mark.parametrize(
    ("loss", "weights", "touched"),
    [
        (plain(), [1.0] * 8, {}),
        # PPO: a token is dropped when its ratio has already gone where the advantage wants it
        (PolicyGradient(), [0.5, 0.9, 1, 1.1, 0, 0, 1, 3], {"loss/clip_share": 2.0}),
        (
            plain(correction=Correction.truncate, correction_cap=2.0),
            [0.5, 0.9, 1, 1.1, 2, 0.5, 1, 2],
            {"loss/correction_share": 2.0},
        ),
        (
            plain(correction=Correction.mask, correction_min=0.8, correction_max=1.25),
            [0, 0.9, 1, 1.1, 0, 0, 1, 0],
            {"loss/correction_share": 4.0},
        ),
    ],
    ids=["plain", "clip", "truncate", "mask"],
)
def test_each_correction_weights_the_advantage_as_its_formula_says(
    loss: PolicyGradient, weights: list[float], touched: dict[str, float]
) -> None:
    sums, gradient = run(loss, RATIOS, GAINS)
    torch.testing.assert_close(gradient, -torch.tensor(weights) * torch.tensor(GAINS))
    assert {name: sums[name] for name in sums if name.endswith("_share")} == touched


def test_advantage_is_what_lies_ahead_too_and_is_cut_last() -> None:
    loss = plain(advantage_clip=2.0)
    sums, gradient = run(loss, [1.0] * 3, [1.0, 1.0, -3.0], future=[0.5, 4.0, 0.0])
    torch.testing.assert_close(gradient, -torch.tensor([1.5, 2.0, -2.0]))
    assert sums["loss/advantage_clip_share"] == 2.0


def test_a_reward_is_added_to_the_teachers_advantage_and_both_are_measured() -> None:
    loss = plain(teacher_weight=0.5, reward_weight=2.0, advantage_clip=2.0)
    sums, gradient = run(loss, [1.0] * 3, [1.0, 1.0, -3.0], reward=[1.0, -1.0, 1.0])
    torch.testing.assert_close(gradient, -torch.tensor([2.5, -1.5, 1.0]))
    assert sums["loss/teacher_advantage"] == pytest.approx(2.0)
    assert sums["loss/reward_advantage"] == pytest.approx(6.0)


def test_grpo_needs_no_teacher_and_a_reference_pulls_by_k3() -> None:
    grpo = CHOICES["grpo"]
    sums, gradient = run(PolicyGradient(grpo), [0.5, 1.0, 3.0], [], reward=[1.0, -1.0, 1.0])
    torch.testing.assert_close(gradient, -torch.tensor([0.5, -1.0, 0.0]))
    assert "loss/reverse_kl_k1" not in sums
    gains = [0.5, -1.0, 2.0]
    _, held = run(
        PolicyGradient(replace(grpo, kl_coef=0.1)), [0.5, 1.0, 3.0], gains, reward=[1.0, -1.0, 1.0]
    )
    torch.testing.assert_close(held - gradient, -0.1 * torch.tensor(gains).expm1())


def test_a_loss_that_lacks_what_it_learns_from_says_so() -> None:
    with pytest.raises(AssertionError, match="reward's advantage"):
        run(policy_gradient(teacher_weight=0.0, reward_weight=1.0), [1.0], [])
    with pytest.raises(AssertionError, match="teacher's log-probs"):
        run(PolicyGradient(), [1.0], [])


@pytest.mark.parametrize("surrogate", Surrogate)
def test_tokens_that_no_engine_wrote_are_taken_as_they_are(surrogate: Surrogate) -> None:
    loss = policy_gradient(correction=Correction.mask, correction_min=0.9, surrogate=surrogate)
    sums, gradient = run(loss, [math.nan, math.nan], [1.0, -2.0])
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 2.0]))
    assert all(math.isfinite(value) for value in sums.values())


def test_estimators_of_reverse_kl_are_sums_over_tokens() -> None:
    sums, _ = run(PolicyGradient(), [1.0, 1.0], [0.5, -1.0])
    assert sums["loss/reverse_kl_k1"] == pytest.approx(0.5)
    assert sums["loss/reverse_kl_k2"] == pytest.approx((0.25 + 1.0) / 2)
    assert sums["loss/reverse_kl_k3"] == pytest.approx(
        math.exp(0.5) - 1 - 0.5 + math.exp(-1.0) - 1 + 1.0
    )
    assert sums["teacher/nll"] == pytest.approx(-2 * LOGP - 0.5 + 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"advantage_clip": 0.0},
        {"clip_ratio_low": 1.5},
        {"clip_ratio_high": -0.1},
        {"kl_coef": -0.1},
    ],
    ids=str,
)
def test_parameters_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^loss\.{name}={value}: allowed is "):
        policy_gradient(**wrong)


def test_mismatch_counts_gap_and_ratio_between_learner_and_engine() -> None:
    ids_BT = torch.zeros(1, 1, dtype=torch.int64)
    batch = Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=ids_BT,
        positions_N=torch.arange(2),
        target_N=torch.zeros(2, dtype=torch.int64),
        engine_logp_N=torch.tensor([-1.0, -2.0]),
    )
    out = mismatch_metrics(torch.tensor([-1.5, -1.0]), batch)
    sums, maxima = out.sums, out.maxima
    assert float(sums["engine/logp_gap"]) == pytest.approx(1.5)
    assert float(sums["engine/ratio"]) == pytest.approx(math.exp(-0.5) + math.exp(1.0))
    assert float(maxima["engine/logp_gap_max"]) == pytest.approx(1.0)
    assert float(maxima["engine/ratio_max"]) == pytest.approx(math.exp(1.0))
    empty = mismatch_metrics(torch.zeros(0), batch.rows(0, 0)).maxima
    assert empty == {"engine/logp_gap_max": 0.0, "engine/ratio_max": 0.0}
