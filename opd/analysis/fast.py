"""Leading singular values of an update without a decomposition, each between two bounds.

G = D^T D acts on the shorter side; each product with G is a pass over the chunks of D, in float64.
Ritz values of a block Krylov space of G never exceed its eigenvalues. Their error is bounded by the
coupling of the space to the rest of G and by the largest eigenvalue of that rest. The latter is at
most the rest's energy, and at most an estimate from random vectors: a Gaussian vector w has a component
below e in the leading direction with a probability of at most sqrt(2 / pi) e, and |G^q w| is at least
that component times the q-th power of the eigenvalue (Dixon 1983).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from opd.analysis.sides import Sides
from opd.analysis.spectrum import ENERGIES

BLOCK, STEPS = 24, 8
"""Columns of a block, and blocks, of the Krylov space."""
PROBES, POWERS = 16, 8
"""Random vectors, and the power of G that is applied to each."""
FAILURE_PROBABILITY = 1e-10
"""Probability that the bounds of a matrix do not hold."""
FLOAT64 = 1e-12
"""Relative tolerance for rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeadingValues:
    """The largest singular values [up to 64], in descending order, between ``least`` and ``most``."""

    least: np.ndarray
    most: np.ndarray
    energy: float

    def metrics(self) -> dict[str, float]:
        """Energy shares (lower bounds) and stable rank (an upper bound)."""
        found = {f"energy_{k}": _share(self.least, k, self.energy) for k in ENERGIES}
        return found | {"stable_rank": self.energy / float(self.least[0]) ** 2}

    def bounds(self) -> dict[str, float]:
        """The largest possible error of each figure of ``metrics``."""
        found = {
            f"energy_{k}": min(1.0, _share(self.most, k, self.energy))
            - _share(self.least, k, self.energy)
            + FLOAT64
            for k in ENERGIES
        }
        stable = [self.energy / float(s[0]) ** 2 for s in (self.least, self.most)]
        return found | {"stable_rank": stable[0] - stable[1] + FLOAT64 * stable[0]}


def _share(values: np.ndarray, k: int, energy: float) -> float:
    return float((values[:k] ** 2).sum()) / energy


def bound_leading_values(sides: Sides) -> LeadingValues:
    """Bounds of the leading singular values of the update of a matrix that changed."""
    generator = torch.Generator().manual_seed(0)
    basis, images = _build_krylov(sides, generator)
    squares, mixed = torch.linalg.eigh(basis.T @ images)
    squares, mixed = squares.flip(0).clamp_min(0), mixed.flip(1)
    coupling = images - basis @ (basis.T @ images)
    missed = ((coupling @ mixed) ** 2).sum(0)
    energy = sum(
        float(torch.linalg.vector_norm(chunk.update.double()) ** 2) for chunk in sides.tall()
    )
    rest = min(_bound_rest(sides, basis, generator), max(0.0, energy - float(squares.sum())))
    number = min(max(ENERGIES), len(squares))
    most = _bound_eigenvalues(squares, missed, rest)[:number]
    least, slack = squares[:number].sqrt().numpy(), FLOAT64 * math.sqrt(energy)
    return LeadingValues(least=least, most=most.sqrt().numpy() + slack, energy=energy)


def _apply(sides: Sides, vectors: torch.Tensor) -> torch.Tensor:
    """G times vectors [shorter side, some]."""
    found = torch.zeros_like(vectors)
    for chunk in sides.tall():
        update = chunk.update.double()
        found.addmm_(update.T, update @ vectors)
    return found


def _build_krylov(sides: Sides, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the space, and G times it."""
    smaller = min(sides.shape)
    basis = torch.zeros(smaller, 0, dtype=torch.float64)
    images = torch.zeros(smaller, 0, dtype=torch.float64)
    block = torch.randn(smaller, BLOCK, generator=generator, dtype=torch.float64)
    for _ in range(min(STEPS, math.ceil(smaller / BLOCK))):
        done = basis.shape[1]
        # Householder vectors are orthogonal to the earlier ones whatever the block's rank
        fresh = torch.linalg.qr(torch.cat([basis, block], dim=1)).Q[:, done:]
        block = _apply(sides, fresh)
        basis = torch.cat([basis, fresh], dim=1)
        images = torch.cat([images, block], dim=1)
    return basis, images


def _bound_rest(sides: Sides, basis: torch.Tensor, generator: torch.Generator) -> float:
    """Upper bound of the largest eigenvalue of G outside the basis; fails with FAILURE_PROBABILITY."""

    def outside(vectors: torch.Tensor) -> torch.Tensor:
        return vectors - basis @ (basis.T @ vectors)

    vectors = torch.randn(len(basis), PROBES, generator=generator, dtype=torch.float64)
    vectors, scale = outside(vectors), 0.0
    for _ in range(POWERS):
        vectors = outside(_apply(sides, vectors))
        length = float(vectors.norm(dim=0).max())
        if not length:
            return 0.0
        vectors, scale = vectors / length, scale + math.log(length)
    least = FAILURE_PROBABILITY ** (1 / PROBES) * math.sqrt(math.pi / 2)
    return math.exp((scale - math.log(least)) / POWERS)


def _bound_eigenvalues(squares: torch.Tensor, missed: torch.Tensor, rest: float) -> torch.Tensor:
    """Upper bounds of the eigenvalues of G.

    The first j Ritz vectors and everything else are two blocks of G, coupled by at most the norm of
    the first j columns of ``missed``. Eigenvalue i is then at most the larger eigenvalue of [[ritz_i,
    coupling], [coupling, top of the other block]], whose top is bounded in the same way; the smallest
    bound over j counts.
    """
    number = len(squares)
    before = missed.cumsum(0)
    behind = missed.sum() - before
    following = torch.cat([squares[1:], torch.zeros(1, dtype=squares.dtype)])
    other = _larger_eigenvalue(following, behind.clamp_min(0), torch.full_like(squares, rest))
    table = _larger_eigenvalue(squares[:, None], before[None], other[None])
    invalid = torch.ones(number, number, dtype=torch.bool).tril(-1)
    return table.masked_fill(invalid, math.inf).amin(dim=1)


def _larger_eigenvalue(a: torch.Tensor, coupling: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The larger eigenvalue of [[a, c], [c, b]], given c^2."""
    return (a + b + ((a - b) ** 2 + 4 * coupling).sqrt()) / 2
