"""Leading singular values of an update without decomposing it, each between two bounds.

G = D^T D acts on the shorter side, a pass over the chunks of D for each product, in float64. Ritz
values of a block Krylov space of G never exceed its eigenvalues. What they may miss is bounded from
the coupling of the space to the rest of G, and from the largest eigenvalue of that rest, which is at
most its energy, and at most what random witnesses of it tell: a Gaussian vector w has a part below e
in the leading direction with a chance of at most sqrt(2 / pi) e, and G^q w is at least that part
times the q-th power of the eigenvalue (Dixon 1983).
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from opd.analysis.sides import Sides
from opd.analysis.spectrum import ENERGIES

BLOCK, STEPS = 24, 8
"""Columns and blocks of the Krylov space."""
WITNESSES, POWERS = 16, 8
WRONG = 1e-10
"""Chance that a matrix' bounds do not hold."""
FLOAT64 = 1e-12
"""Room for rounding, relative."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leading:
    """Singular values [at most 64], largest first: each is at least ``least`` and at most ``most``."""

    least: np.ndarray
    most: np.ndarray
    energy: float

    def shape(self) -> dict[str, float]:
        """Energy shares (too small, if anything) and stable rank (too large, if anything)."""
        told = {f"energy_{k}": _share(self.least, k, self.energy) for k in ENERGIES}
        return told | {"stable_rank": self.energy / float(self.least[0]) ** 2}

    def bounds(self) -> dict[str, float]:
        """How far each figure of ``shape`` can be from the true one."""
        told = {
            f"energy_{k}": min(1.0, _share(self.most, k, self.energy))
            - _share(self.least, k, self.energy)
            + FLOAT64
            for k in ENERGIES
        }
        stable = [self.energy / float(s[0]) ** 2 for s in (self.least, self.most)]
        return told | {"stable_rank": stable[0] - stable[1] + FLOAT64 * stable[0]}


def _share(values: np.ndarray, k: int, energy: float) -> float:
    return float((values[:k] ** 2).sum()) / energy


def leading(sides: Sides) -> Leading:
    """The leading singular values of the update of a matrix that changed."""
    generator = torch.Generator().manual_seed(0)
    basis, images = _krylov(sides, generator)
    squares, mixed = torch.linalg.eigh(basis.T @ images)
    squares, mixed = squares.flip(0).clamp_min(0), mixed.flip(1)
    coupling = images - basis @ (basis.T @ images)
    missed = ((coupling @ mixed) ** 2).sum(0)
    energy = sum(float(torch.linalg.vector_norm(cut.update.double()) ** 2) for cut in sides.tall())
    rest = min(_witnessed(sides, basis, generator), max(0.0, energy - float(squares.sum())))
    number = min(max(ENERGIES), len(squares))
    most = _upper(squares, missed, rest)[:number]
    least, slack = squares[:number].sqrt().numpy(), FLOAT64 * math.sqrt(energy)
    return Leading(least=least, most=most.sqrt().numpy() + slack, energy=energy)


def _applied(sides: Sides, vectors: torch.Tensor) -> torch.Tensor:
    """G times vectors [shorter side, some]."""
    found = torch.zeros_like(vectors)
    for cut in sides.tall():
        update = cut.update.double()
        found.addmm_(update.T, update @ vectors)
    return found


def _krylov(sides: Sides, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the space, and G times it."""
    smaller = min(sides.shape)
    basis = torch.zeros(smaller, 0, dtype=torch.float64)
    images = torch.zeros(smaller, 0, dtype=torch.float64)
    block = torch.randn(smaller, BLOCK, generator=generator, dtype=torch.float64)
    for _ in range(min(STEPS, math.ceil(smaller / BLOCK))):
        done = basis.shape[1]
        # Householder's vectors are orthogonal to the former ones whatever the block's rank
        fresh = torch.linalg.qr(torch.cat([basis, block], dim=1)).Q[:, done:]
        block = _applied(sides, fresh)
        basis = torch.cat([basis, fresh], dim=1)
        images = torch.cat([images, block], dim=1)
    return basis, images


def _witnessed(sides: Sides, basis: torch.Tensor, generator: torch.Generator) -> float:
    """What the largest eigenvalue of G outside the basis stays below, but for a chance of WRONG."""

    def outside(vectors: torch.Tensor) -> torch.Tensor:
        return vectors - basis @ (basis.T @ vectors)

    vectors = torch.randn(len(basis), WITNESSES, generator=generator, dtype=torch.float64)
    vectors, scale = outside(vectors), 0.0
    for _ in range(POWERS):
        vectors = outside(_applied(sides, vectors))
        length = float(vectors.norm(dim=0).max())
        if not length:
            return 0.0
        vectors, scale = vectors / length, scale + math.log(length)
    least = WRONG ** (1 / WITNESSES) * math.sqrt(math.pi / 2)
    return math.exp((scale - math.log(least)) / POWERS)


def _upper(squares: torch.Tensor, missed: torch.Tensor, rest: float) -> torch.Tensor:
    """What the eigenvalues of G stay below.

    The first j Ritz vectors and everything else are two blocks of G, coupled by at most the norm of
    the first j columns missed. Eigenvalue i is then at most the larger one of [[ritz_i, coupling],
    [coupling, top of the other block]], whose top is bounded in the same way; the best j counts.
    """
    number = len(squares)
    before = missed.cumsum(0)
    behind = missed.sum() - before
    following = torch.cat([squares[1:], torch.zeros(1, dtype=squares.dtype)])
    other = _larger(following, behind.clamp_min(0), torch.full_like(squares, rest))
    table = _larger(squares[:, None], before[None], other[None])
    never = torch.ones(number, number, dtype=torch.bool).tril(-1)
    return table.masked_fill(never, math.inf).amin(dim=1)


def _larger(a: torch.Tensor, coupling: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The larger eigenvalue of [[a, c], [c, b]], given c^2."""
    return (a + b + ((a - b) ** 2 + 4 * coupling).sqrt()) / 2
