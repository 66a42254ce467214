"""What changed between two tensors: on the bf16 grid, in size, and along which directions."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
"""Sizes of a difference up to which it counts as none."""
ULPS = (0, 1, 2, 4, 8, 16)
"""Upper ends of the bins of ``ulp_counts``; one more bin holds what is beyond."""
BLOCK, ROUNDS = 16, 6
"""Directions that are iterated together, and how often."""


def ulp_distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How many bf16 numbers lie on the way from one to the other, int32; 0.0 and -0.0 are one."""
    return (_rank(after) - _rank(before)).abs()


def _rank(values: torch.Tensor) -> torch.Tensor:
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
    """The strongest directions of a matrix [m, n].

    ``left`` [m, k] holds the leading left singular vectors. ``stable_rank`` is ‖D‖F² / s1² with s1
    as found, which is s1 or less; the true one is not below ``stable_rank_least``.
    """

    left: torch.Tensor
    stable_rank: float
    stable_rank_least: float


def top_directions(matrix: torch.Tensor, k: int) -> Top | None:
    """Block power iteration in float32 from a start that is the same for every shape; None for zeros.

    The lower bound is certain where s1² <= ‖QQᵀD‖2² + ‖D - QQᵀD‖F² decides; where the residual
    ‖DDᵀu - s1²u‖ is smaller it holds if u has found the largest singular value and not another.
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
    """Undo of ``packed``."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(1) >> shifts & 1).bool().view(-1)[:length]
