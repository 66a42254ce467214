"""Importance ratios of tokens and of whole completions, against their formulas written out."""

import math

import pytest
import torch

from opd.batch import Batch
from opd.config.loss import NllLossConfig
from opd.losses.nll import NegativeLogLikelihood
from opd.losses.token_weights import ImportanceCorrection
from opd.train.student import with_sequence_gaps
from opd.types import Correction

V = 3


def completions(*gaps: list[float]) -> tuple[torch.Tensor, Batch]:
    """Uniform student log-probs [N, V], and completions whose tokens have these log-prob gaps."""
    gap_N = torch.tensor([gap for each in gaps for gap in each])
    n = len(gap_N)
    student_NV = torch.full((n, V), -math.log(V))
    ids_BT = torch.zeros(len(gaps), 1, dtype=torch.int64)
    batch = Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=ids_BT,
        positions_N=torch.arange(n),
        target_N=torch.zeros(n, dtype=torch.int64),
        engine_logp_N=student_NV[:, 0] - gap_N,
        sequence_N=torch.repeat_interleave(
            torch.arange(len(gaps)), torch.tensor([len(each) for each in gaps])
        ),
    )
    return student_NV, with_sequence_gaps(batch, student_NV[:, 0])


def ratios(
    correction: str,
    *gaps: list[float],
    cap: float = 3.0,
    band: tuple[float, float] = (0.5, 3.0),
) -> tuple[list[float], list[bool]]:
    student_NV, batch = completions(*gaps)
    config = NllLossConfig(
        correction=Correction(correction),
        correction_cap=cap,
        correction_min=band[0],
        correction_max=band[1],
    )
    ratio_N, changed_N = ImportanceCorrection(config).ratios(student_NV, batch)
    return ratio_N.tolist(), changed_N.tolist()


def textbook(correction: str, gaps: list[float]) -> list[float]:
    """Cap 3 and a band of 0.5 to 3, as TRL's vllm_importance_sampling_mode has them."""
    each = [math.exp(gap) for gap in gaps]
    product = math.prod(each)
    level = {
        "sequence": [product] * len(gaps),
        "geometric": [product ** (1 / len(gaps))] * len(gaps),
    }.get(correction.partition("_")[0], each)
    if correction.endswith("truncate"):
        return [min(r, 3.0) for r in level]
    return [r if 0.5 <= r <= 3.0 else 0.0 for r in level]


@pytest.mark.parametrize("correction", [c for c in Correction if c != Correction.none])
@pytest.mark.parametrize(
    "gaps", [[0.3], [0.5, 0.5, 0.5], [2.0, -1.9], [-0.4] * 4, [0.01] * 300, [1.2, 0.0]]
)
def test_each_correction_is_the_ratio_that_its_name_says(
    correction: Correction, gaps: list[float]
) -> None:
    found, changed = ratios(correction, gaps, [0.1, -0.1])
    expected = textbook(correction, gaps) + textbook(correction, [0.1, -0.1])
    assert found == pytest.approx(expected, rel=2e-4)
    if correction.of_sequence:
        assert len(set(changed[: len(gaps)])) == 1


def test_the_product_grows_with_the_length_and_the_geometric_mean_does_not() -> None:
    for length in (1, 10, 100, 1000):
        (product, *_), _ = ratios("sequence_truncate", [0.01] * length, cap=1e9)
        (mean, *_), _ = ratios("geometric_truncate", [0.01] * length, cap=1e9)
        assert math.log(product) == pytest.approx(0.01 * length, rel=1e-4)
        assert math.log(mean) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("correction", [c for c in Correction if c.of_sequence])
@pytest.mark.parametrize("gap", [0.5, 5.0, 50.0, -0.5, -50.0, -math.inf])
@pytest.mark.parametrize("bound", [3.0, math.inf])
def test_thousands_of_tokens_give_finite_ratios_with_any_bound(
    correction: Correction, gap: float, bound: float
) -> None:
    found, _ = ratios(correction, [gap] * 4000, cap=bound, band=(0.0, bound))
    assert all(0.0 <= ratio <= math.exp(20.001) for ratio in found)
    student_NV, batch = completions([gap] * 4000)
    loss = NegativeLogLikelihood(
        NllLossConfig(correction=correction, correction_cap=bound, correction_max=bound)
    )
    assert loss(student_NV, batch).total.isfinite()


@pytest.mark.parametrize("correction", [c for c in Correction if c.of_sequence])
@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([math.nan, math.nan], (1.0, 1.0)),
        ([math.nan, 0.2], (math.exp(0.2), math.exp(0.1))),
        ([0.3, math.nan, 0.3, math.nan], (math.exp(0.6), math.exp(0.15))),
    ],
)
def test_tokens_that_no_engine_wrote_have_no_gap(
    correction: Correction, gaps: list[float], expected: tuple[float, float]
) -> None:
    found, changed = ratios(correction, gaps)
    product, mean = expected
    level = product if correction.startswith("sequence") else mean
    assert found == pytest.approx([level] * len(gaps), rel=1e-5)
    assert not any(changed)


def test_small_gaps_of_a_long_completion_are_added_up_exactly() -> None:
    for length in (100, 3000, 20_000):
        student_NV, batch = completions([1e-3] * length)
        assert batch.sequence_gap_N is not None
        assert batch.sequence_mean_gap_N is not None
        gap = float((student_NV[:, 0] - batch.engine_logp_N)[0])
        assert float(batch.sequence_gap_N[0]) == pytest.approx(length * gap, rel=1e-6)
        assert float(batch.sequence_mean_gap_N[0]) == pytest.approx(gap, rel=1e-6)
