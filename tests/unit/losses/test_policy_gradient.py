"""Each surrogate and correction by hand, and what is counted as touched."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from opd.batch import Batch
from opd.losses.mismatch import mismatch_metrics
from opd.losses.policy_gradient import PolicyGradient
from opd.losses.token_weights import ImportanceCorrection, TokenWeights
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


def corrected(**settings: Any) -> PolicyGradient:
    factors = TokenWeights(correction=ImportanceCorrection(**settings))
    return PolicyGradient(surrogate=Surrogate.plain, factors=factors)


@pytest.mark.parametrize(
    ("loss", "weights", "touched"),
    [
        (PolicyGradient(surrogate=Surrogate.plain), [1.0] * 8, {}),
        # PPO: a token is dropped when its ratio has already gone where the advantage wants it
        (PolicyGradient(), [0.5, 0.9, 1, 1.1, 0, 0, 1, 3], {"loss/clip_share": 2.0}),
        (
            corrected(correction=Correction.truncate, cap=2.0),
            [0.5, 0.9, 1, 1.1, 2, 0.5, 1, 2],
            {"loss/correction_share": 2.0},
        ),
        (
            corrected(correction=Correction.mask, band_low=0.8, band_high=1.25),
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
    loss = PolicyGradient(surrogate=Surrogate.plain, advantage_clip=2.0)
    sums, gradient = run(loss, [1.0] * 3, [1.0, 1.0, -3.0], future=[0.5, 4.0, 0.0])
    torch.testing.assert_close(gradient, -torch.tensor([1.5, 2.0, -2.0]))
    assert sums["loss/advantage_clip_share"] == 2.0


def test_a_reward_is_added_to_what_the_teacher_says_and_both_are_measured() -> None:
    loss = PolicyGradient(
        surrogate=Surrogate.plain, teacher_weight=0.5, reward_weight=2.0, advantage_clip=2.0
    )
    sums, gradient = run(loss, [1.0] * 3, [1.0, 1.0, -3.0], reward=[1.0, -1.0, 1.0])
    torch.testing.assert_close(gradient, -torch.tensor([2.5, -1.5, 1.0]))
    assert sums["loss/teacher_advantage"] == pytest.approx(2.0)
    assert sums["loss/reward_advantage"] == pytest.approx(6.0)


def test_grpo_asks_no_teacher_and_a_reference_pulls_by_k3() -> None:
    grpo = PolicyGradient(teacher_weight=0.0, reward_weight=1.0)
    sums, gradient = run(grpo, [0.5, 1.0, 3.0], [], reward=[1.0, -1.0, 1.0])
    torch.testing.assert_close(gradient, -torch.tensor([0.5, -1.0, 0.0]))
    assert "loss/reverse_kl_k1" not in sums
    gains = [0.5, -1.0, 2.0]
    _, held = run(replace(grpo, kl=0.1), [0.5, 1.0, 3.0], gains, reward=[1.0, -1.0, 1.0])
    torch.testing.assert_close(held - gradient, -0.1 * torch.tensor(gains).expm1())


def test_a_loss_that_lacks_what_it_learns_from_says_so() -> None:
    with pytest.raises(AssertionError, match="reward's advantage"):
        run(PolicyGradient(teacher_weight=0.0, reward_weight=1.0), [1.0], [])
    with pytest.raises(AssertionError, match="teacher's log-probs"):
        run(PolicyGradient(), [1.0], [])


@pytest.mark.parametrize("surrogate", Surrogate)
def test_tokens_that_no_engine_wrote_are_taken_as_they_are(surrogate: Surrogate) -> None:
    loss = replace(corrected(correction=Correction.mask, band_low=0.9), surrogate=surrogate)
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
        {"clip_low": 1.5},
        {"clip_high": -0.1},
        {"kl": -0.1},
    ],
)
def test_parameters_out_of_bounds_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        PolicyGradient(**wrong)


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
