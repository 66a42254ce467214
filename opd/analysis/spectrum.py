"""Spectra of a matrix before and after training and of its update, from one decomposition each.

The Gram matrix of the shorter side is summed in float64 over chunks of the longer one. It loses half
the digits, which leaves singular values to 1e-8 s_1, finer than a float32 decomposition of the matrix
itself (6e-8 s_1). Memory is that of the shorter side squared.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from opd.analysis.sides import Sides

RANKS = (0.01, 0.05, 0.1, 0.2)
"""Shares of the smaller dimension that count as principal."""
ENERGIES = (1, 2, 4, 8, 16, 32, 64)
NUMERICAL = (1e-6, 1e-5, 1e-4)
"""Singular values above these multiples of the largest one count towards the numerical rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Directions:
    """Leading singular vectors of the shorter side, [min dim, k], and all singular values [min dim]."""

    values: torch.Tensor
    short: torch.Tensor

    @property
    def inverse(self) -> torch.Tensor:
        """1 / s of the leading singular values; 0 where the matrix has lower rank."""
        s = self.values[: self.short.shape[1]]
        return torch.where(s > 1e-7 * self.values[0], 1 / s.clamp_min(1e-300), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spectra:
    """Singular values [min dim], largest first, and figures of the directions by rank share."""

    base: np.ndarray
    trained: np.ndarray
    update: np.ndarray
    projection: dict[float, float]
    left: dict[float, float]
    right: dict[float, float]
    rotation: dict[float, float]
    directions: Directions

    def drift(self) -> tuple[float, float]:
        """|s(W1) - s(W0)| over |s(W0)|, and over |D|."""
        moved = float(np.linalg.norm(self.trained - self.base))
        return (
            _ratio(moved, float(np.linalg.norm(self.base))),
            _ratio(moved, float(np.linalg.norm(self.update))),
        )


def principal_rank(share: float, smaller: int) -> int:
    """floor(share x min dim), at least 1."""
    return max(1, math.floor(share * smaller))


def spectra(sides: Sides) -> Spectra:
    """All spectra of a matrix, in one pass over it and three symmetric decompositions.

    The principal projection is |U_k^T D V_k|^2 / |D|^2 with k = principal_rank(share); ``left`` and
    ``right`` keep one side only; rotation is the mean sine of the principal angles between the
    leading left subspaces of W0 and W1.
    """
    rows, columns = sides.shape
    p = min(rows, columns)
    g0, gd, cross = (torch.zeros(p, p, dtype=torch.float64) for _ in range(3))
    rounded, rounded_base = (torch.zeros(p, p, dtype=torch.float64) for _ in range(2))
    for chunk in sides.tall():
        x, d = chunk.base.double(), chunk.update.double()
        g0.addmm_(x.T, x)
        gd.addmm_(d.T, d)
        cross.addmm_(x.T, d)
        # the rounding of the subtraction, e = W1 - W0 - D, affects few weights
        e = (chunk.trained.double() - x).sub_(d).T
        if e.any():
            e = e.to_sparse() if e.count_nonzero() < e.numel() // 20 else e
            rounded_base += e @ x
            rounded += e @ d.add_(e.to_dense().T, alpha=0.5)
    largest, energy = principal_rank(max(RANKS), p), float(gd.trace())
    before = _leading(g0, largest)
    short, long, two = _projections(before, gd, cross)
    update = _roots(torch.linalg.eigvalsh(gd))
    # in place, since these matrices dominate memory: W0^T W1 and W1^T W1
    cross += rounded_base.T
    rounded.add_(gd, alpha=0.5).add_(cross)
    cross += g0
    g0 += rounded
    g0 += rounded.T
    del gd, rounded, rounded_base
    after = _leading(g0, largest)
    swapped = columns > rows
    return Spectra(
        base=before.values.numpy(),
        trained=after.values.numpy(),
        update=update.numpy(),
        projection={r: _ratio(float(two[principal_rank(r, p) - 1]), energy) for r in RANKS},
        left={
            r: _ratio(float((short if swapped else long)[principal_rank(r, p) - 1]), energy)
            for r in RANKS
        },
        right={
            r: _ratio(float((long if swapped else short)[principal_rank(r, p) - 1]), energy)
            for r in RANKS
        },
        rotation=_rotation(before, after, None if swapped else cross),
        directions=before,
    )


def _leading(gram: torch.Tensor, rank: int) -> Directions:
    squares, vectors = torch.linalg.eigh(gram)
    return Directions(values=_roots(squares), short=vectors[:, -rank:].flip(1).contiguous())


def _roots(squares: torch.Tensor) -> torch.Tensor:
    """Singular values from ascending eigenvalues; those below the rounding error are 0."""
    floor = 4 * torch.finfo(squares.dtype).eps * float(squares[-1].clamp_min(0))
    return torch.where(squares > floor, squares, 0.0).clamp_min(0).sqrt().flip(0)


def _projections(
    base: Directions, gd: torch.Tensor, cross: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Energy of D in the k leading directions of the short side, the long side, and both [k]."""
    short = ((gd @ base.short) * base.short).sum(0).cumsum(0)
    onto_long = base.inverse[:, None] * (base.short.T @ cross)
    long = (onto_long**2).sum(1).cumsum(0)
    both = (onto_long @ base.short) ** 2
    return short, long, both.cumsum(0).cumsum(1).diagonal()


def _rotation(
    before: Directions, after: Directions, between: torch.Tensor | None
) -> dict[float, float]:
    """Mean sine of the principal angles; the left side is the short one if ``between`` (W0^T W1) is None."""
    if between is None:
        cosines = before.short.T @ after.short
    else:
        cosines = before.short.T @ between @ after.short
        cosines = before.inverse[:, None] * cosines * after.inverse
    found = {}
    for share in RANKS:
        k = principal_rank(share, len(before.values))
        c = cosines[:k, :k]
        sines = torch.linalg.eigvalsh(torch.eye(k, dtype=c.dtype) - c.T @ c)
        found[share] = float(sines.clamp(0, 1).sqrt().mean())
    return found


def spectral_metrics(values: np.ndarray) -> dict[str, float]:
    """Energy shares, stable, effective and numerical rank of singular values, largest first."""
    squares, total = values**2, float((values**2).sum())
    if not total:
        return {}
    found = {f"energy_{k}": float(squares[:k].sum()) / total for k in ENERGIES}
    p = values[values > 0] / values.sum()
    found["stable_rank"] = total / float(squares[0])
    found["effective_rank"] = math.exp(-float((p * np.log(p)).sum()))
    for t in NUMERICAL:
        found[f"numerical_rank_{t:.0e}".replace("e-0", "e-")] = int((values > t * values[0]).sum())
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
