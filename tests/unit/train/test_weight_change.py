"""Formulas of what changed, against plain dense float64 code."""

import pytest
import torch

from opd.train.weight_change import (
    counts_within,
    packed,
    subspace_similarity,
    top_directions,
    ulp_counts,
    ulp_distance,
    unpacked,
)


def test_ulp_distance_counts_steps_of_nextafter_on_the_bf16_grid() -> None:
    start = torch.tensor([1.0, -1.0, 0.0, 1.0, -3e-39, 0.25, 0.0])
    after = torch.tensor([1.0078125, -1.015625, -0.0, 2.0, 3e-39, 0.25, 9.2e-41])
    steps = []
    for one, other in zip(start.bfloat16(), after.bfloat16(), strict=True):
        count = 0
        while one != other:
            one = torch.nextafter(one, other)
            count += 1
        steps.append(count)
    assert ulp_distance(start, after).tolist() == steps
    assert steps[:4] == [1, 2, 0, 128]


def test_ulp_bins_hold_every_coordinate() -> None:
    distance = torch.tensor([0, 0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 1000], dtype=torch.int32)
    assert ulp_counts(distance) == [2, 1, 1, 2, 2, 2, 2]


def test_counts_within_include_their_bound() -> None:
    difference = torch.tensor([0.0, 1e-8, -1e-5, 2e-5, -1.0])
    assert counts_within(difference, (0.0, 1e-8, 1e-5, 1e-4)) == [1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (5, 90), (12, 3), (1, 7)])
@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_the_stable_rank_is_bracketed(shape: tuple[int, int], decay: float) -> None:
    torch.manual_seed(0)
    matrix = 1e-6 * torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s * decay ** torch.arange(len(s))
    matrix = (u * s @ v).float()
    top = top_directions(matrix, 4)
    assert top is not None
    expected = float((s**2).sum() / s[0] ** 2)
    assert top.stable_rank_least <= expected * (1 + 1e-4)
    assert expected * (1 - 1e-4) <= top.stable_rank <= expected * 1.1
    if decay < 1:
        assert top.stable_rank == pytest.approx(expected, rel=1e-4)
        assert subspace_similarity(u[:, :4], top.left) == pytest.approx(1, abs=1e-3)


def test_nothing_has_no_directions() -> None:
    assert top_directions(torch.zeros(4, 5), 2) is None


def test_similarity_is_1_for_one_subspace_and_k_over_m_by_chance() -> None:
    torch.manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(200, 8)).Q for _ in range(21)]
    turned = bases[0] @ torch.linalg.qr(torch.randn(8, 8)).Q
    assert subspace_similarity(bases[0], turned) == pytest.approx(1, abs=1e-5)
    by_chance = [subspace_similarity(bases[0], other) for other in bases[1:]]
    assert sum(by_chance) / len(by_chance) == pytest.approx(8 / 200, rel=0.15)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000])
def test_bits_come_back_as_they_were(length: int) -> None:
    flags = torch.rand(length, generator=torch.Generator().manual_seed(length)) < 0.5
    bits = packed(flags)
    assert bits.dtype == torch.uint8
    assert len(bits) == (length + 7) // 8
    assert torch.equal(unpacked(bits, length), flags)
