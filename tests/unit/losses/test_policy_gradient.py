"""Each importance correction by hand, and what is counted as touched."""

import math

import pytest
import torch

from opd.batch import Batch
from opd.losses import Importance, PolicyGradient, mismatch_metrics

# Two ids; the target is id 0 with probability 1/2 under the learner, in every row.
LOGP = math.log(0.5)


def run(
    loss: PolicyGradient,
    ratios: list[float],
    gains: list[float],
    future: list[float] | None = None,
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
        teacher_logp_N=LOGP + torch.tensor(gains),
        future_N=None if future is None else torch.tensor(future),
    )
    out = loss(logp_NV, batch)
    (gradient,) = torch.autograd.grad(out.total, logp_NV)
    assert (gradient[:, 1] == 0).all()
    return {name: float(value) for name, value in out.sums.items()}, gradient[:, 0]


RATIOS = [0.5, 0.9, 1.0, 1.1, 3.0, 0.5, 1.0, 3.0]
GAINS = [1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("loss", "weights", "share"),
    [
        (PolicyGradient(importance=Importance.none), [1.0] * 8, None),
        # PPO: a token is dropped when its ratio has already gone where the advantage wants it
        (PolicyGradient(importance=Importance.clip), [0.5, 0.9, 1, 1.1, 0, 0, 1, 3], 2.0),
        (
            PolicyGradient(importance=Importance.truncate, cap=2.0),
            [0.5, 0.9, 1, 1.1, 2, 0.5, 1, 2],
            2.0,
        ),
        (
            PolicyGradient(importance=Importance.mask, band_low=0.8, band_high=1.25),
            [0, 0.9, 1, 1.1, 0, 0, 1, 0],
            4.0,
        ),
    ],
    ids=lambda x: str(x.importance) if isinstance(x, PolicyGradient) else "",
)
def test_each_correction_weights_the_advantage_as_its_formula_says(
    loss: PolicyGradient, weights: list[float], share: float | None
) -> None:
    sums, gradient = run(loss, RATIOS, GAINS)
    torch.testing.assert_close(gradient, -torch.tensor(weights) * torch.tensor(GAINS))
    assert sums.get(f"loss/{loss.importance}_share") == share


def test_advantage_is_what_lies_ahead_too_and_is_cut_last() -> None:
    loss = PolicyGradient(importance=Importance.none, advantage_clip=2.0)
    sums, gradient = run(loss, [1.0] * 3, [1.0, 1.0, -3.0], future=[0.5, 4.0, 0.0])
    torch.testing.assert_close(gradient, -torch.tensor([1.5, 2.0, -2.0]))
    assert sums["loss/advantage_clip_share"] == 2.0


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
        {"cap": 0.0},
        {"band_low": 1.1},
        {"band_high": 0.9},
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
