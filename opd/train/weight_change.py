"""The difference of two tensors: on the bf16 grid, in size, and in its strongest directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
"""Bounds up to which a difference counts as zero."""
ULPS = (0, 1, 2, 4, 8, 16)
"""Upper ends of the bins of ``ulp_counts``; one more bin holds everything above."""
BLOCK, ROUNDS = 16, 6
"""Power iteration: directions that are iterated together, and the number of iterations."""


def ulp_distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Steps on the bf16 grid from one number to the other, int32; 0.0 and -0.0 are the same number."""
    return (_rank(after) - _rank(before)).abs()


def _rank(values: torch.Tensor) -> torch.Tensor:
    """The position of each number on the bf16 grid, int32; 0 is 0."""
    bits = values.bfloat16().contiguous().view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def ulp_counts(distance: torch.Tensor) -> list[int]:
    """Coordinates in each bin of ``ULPS``: 0, 1, 2, 3-4, 5-8, 9-16, more."""
    ends = torch.tensor(ULPS, device=distance.device, dtype=distance.dtype)
    bins = torch.bucketize(distance.reshape(-1), ends)
    return torch.bincount(bins, minlength=len(ULPS) + 1).tolist()


def counts_within(difference: torch.Tensor, bounds: Sequence[float] = THRESHOLDS) -> list[int]:
    """Coordinates with abs(difference) <= each bound; 0.0 counts exact zeros."""
    size = difference.float().abs()
    return [int((size <= bound).sum()) for bound in bounds]


def energy(values: torch.Tensor) -> float:
    """Sum of squares in float64."""
    return float(values.float().square().sum(dtype=torch.float64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Top:
    """The strongest directions of a matrix D [m, n].

    ``left`` [m, k] holds the leading left singular vectors. ``stable_rank`` is ‖D‖F² / s1² with the
    estimate of s1, which is at most s1; the true stable rank is at least ``stable_rank_least``.
    """

    left: torch.Tensor
    stable_rank: float
    stable_rank_least: float


def top_directions(matrix: torch.Tensor, k: int) -> Top | None:
    """The ``k`` strongest directions by block power iteration in float32; None for a matrix of zeros.

    Matrices of one shape start from the same random block. The lower bound is certain where it
    follows from s1² <= ‖QQᵀD‖2² + ‖D - QQᵀD‖F²; where the residual ‖DDᵀu - s1²u‖ is smaller, it holds
    if u belongs to the largest singular value and not to another one.
    Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), section 4.
    """
    norm = energy(matrix) ** 0.5
    if norm == 0.0:
        return None
    scaled = matrix.float() / norm
    width = min(BLOCK, *scaled.shape)
    draw = torch.Generator().manual_seed(0)
    right = torch.randn(scaled.shape[1], width, generator=draw).to(scaled.device)
    left = torch.linalg.qr(scaled @ right).Q
    for _ in range(ROUNDS):
        left = torch.linalg.qr(scaled @ (scaled.T @ left)).Q
    reached = scaled.T @ left
    _, values, turn = torch.linalg.svd(reached, full_matrices=False)
    vectors = left @ turn.T
    square = float(values[0]) ** 2
    residual = scaled @ (scaled.T @ vectors[:, 0]) - square * vectors[:, 0]
    missed = max(0.0, 1.0 - energy(values))
    most = min(1.0, square + min(missed, float(residual.norm())))
    return Top(left=vectors[:, :k].contiguous(), stable_rank=1 / square, stable_rank_least=1 / most)


def subspace_similarity(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖AᵀB‖F² / k of two orthonormal bases [m, k]: 1 for the same subspace, k / m by chance."""
    return energy(one.float().T @ other.float()) / one.shape[1]


def packed(flags: torch.Tensor) -> torch.Tensor:
    """Booleans [n] as bits, uint8 [ceil(n / 8)]."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    shifts = torch.arange(8, device=flags.device, dtype=torch.uint8)
    return (padded << shifts).sum(1, dtype=torch.uint8)


def unpacked(bits: torch.Tensor, length: int) -> torch.Tensor:
    """The ``length`` booleans that ``packed`` made bits of."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(1) >> shifts & 1).bool().view(-1)[:length]
