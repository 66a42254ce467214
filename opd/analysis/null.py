"""The null model: an isotropic normal update, independent of the weights, cast to a number format.

A weight w whose neighbours are one spacing u = 2^(floor(log2|w|) - mantissa) away, changed by
d ~ N(0, s^2), shows a change of at least j spacings with probability erfc((j - 1/2) u / (sqrt(2) s))
if the base lies on the format's grid. A base between grid points (float32 that was never rounded) is
taken as uniform in its cell: E[clip(|d| - (j - 1) u, 0, c)] / c, where the cell is c = u wide. The lower
neighbour of a power of two is only u / 2 away, so its cell is 3/4 u wide, and half of its steps go
down, in spacings of u / 2. With p, the share of powers of two, a probability f(u, c) becomes

    on the grid    (1 - p/2) f(u) + p/2 f(u / 2)
    off the grid   (1 - p) f(u, u) + p/2 f(u, 3/4 u) + p/2 f(u / 2, 3/4 u)

Everything depends only on the weight's binade, so a tensor is described by its counts by binade and
the powers of two among them.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from opd.checkpoint.chunks import BINS

_FINE = 1 / 4
"""Spacings below this fraction of s only add their variance u^2 / 12 (up to e^-300)."""
_COARSEST = 1 / 24
"""Spacing, in s, that replaces finer ones where levels are enumerated."""
_REACH = 9.0
"""Standard deviations beyond which probabilities are neglected."""


def spacings(mantissa: int) -> np.ndarray:
    """Distance to the next number of a format for each bin of ``binades``, [BINS]."""
    exponent = np.maximum(np.arange(BINS) - 128, -126)
    return np.exp2(exponent.astype(float) - mantissa)


def _erfc(x: np.ndarray) -> np.ndarray:
    return torch.special.erfc(torch.from_numpy(np.asarray(x, float))).numpy()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """Steps to one neighbour: their share in each binade [BINS], and the lengths that they take.

    ``spacing`` is in units of the binade's, ``cell`` (None on the grid) in units of ``spacing``.
    """

    share: np.ndarray
    spacing: float
    cell: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Null:
    """Probabilities of the null at standard deviation ``s`` per weight, for every binade [BINS].

    ``powers``: share of powers of two among the weights of each binade, as the format rounds them
    [BINS]; without it, that of weights spread evenly.
    """

    s: float
    mantissa: int
    on_grid: bool
    powers: np.ndarray | None = None

    def changed(self) -> np.ndarray:
        """Probability that a weight visibly changes."""
        return self._at_least(np.ones_like)

    def above(self, threshold: float) -> np.ndarray:
        """Probability of abs(D) > threshold."""
        return self._at_least(lambda u: np.floor(threshold / u) + 1)

    def below(self, threshold: float) -> np.ndarray:
        """Probability of abs(D) < threshold."""
        return 1 - self._at_least(lambda u: np.maximum(np.ceil(threshold / u), 1))

    def _at_least(self, level: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Probability that abs(D) is at least ``level(u)`` spacings, a whole number of at least 1."""
        if self.s <= 0:
            return np.zeros(BINS)
        return self._mean(lambda u, cell: _tail(level(u), u, self.s, cell))

    def _mean(self, value: Callable[[np.ndarray, float | None], np.ndarray]) -> np.ndarray:
        """Mean of a function of spacing and cell, over weights on and off powers of two, [BINS]."""
        u, kinds = spacings(self.mantissa), self.kinds()
        return np.sum([kind.share * value(u * kind.spacing, kind.cell) for kind in kinds], axis=0)

    def kinds(self) -> "tuple[_Kind, ...]":
        """The kinds of steps: between usual neighbours, and up and down from a power of two."""
        even = np.full(BINS, 0.75 * 2.0**-self.mantissa)
        powers = even if self.powers is None else self.powers
        if self.on_grid:
            return (
                _Kind(share=1 - powers / 2, spacing=1.0, cell=None),
                _Kind(share=powers / 2, spacing=0.5, cell=None),
            )
        return (
            _Kind(share=1 - powers, spacing=1.0, cell=1.0),
            _Kind(share=powers / 2, spacing=1.0, cell=0.75),
            _Kind(share=powers / 2, spacing=0.5, cell=1.5),
        )

    def energy(self) -> np.ndarray:
        """Mean of D^2."""
        return self._mean(lambda u, cell: _energy(u, self.s, cell))

    def noise(self) -> np.ndarray:
        """Mean of (D - d)^2: the rounding noise of the cast."""
        return self._mean(self._noise) if self.s > 0 else np.zeros(BINS)

    def _noise(self, u: np.ndarray, cell: float | None) -> np.ndarray:
        s = self.s
        if cell is not None:
            return np.minimum(u**2 / 6, s**2)
        scale = math.sqrt(2 / math.pi) * s
        cross = u * _levels(u, s, lambda j: scale * np.exp(-(((j - 0.5) * u / s) ** 2) / 2))
        exact = _energy(u, s, cell) - 2 * cross + s**2
        return np.where(u < _FINE * s, u**2 / 12, np.maximum(exact, 0.0))

    def concentration(self, counts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
        """Share of the energy in the ceil(share x n) coordinates that changed most, for each share."""
        if self.s <= 0:
            return [math.nan] * len(shares)
        values, weights = [], []
        for bin, kind in itertools.product(np.flatnonzero(counts), self.kinds()):
            u = max(kind.spacing * spacings(self.mantissa)[bin], self.s * _COARSEST)
            j = np.arange(1, math.ceil(_REACH * self.s / u) + 2)
            chance = _tail(j.astype(float), np.full(len(j), u), self.s, kind.cell)
            values.append(j * u)
            weights.append(kind.share[bin] * counts[bin] * -np.diff(np.append(chance, 0.0)))
        value, weight = np.concatenate(values), np.concatenate(weights)
        order = np.argsort(-value)
        value, weight = value[order], weight[order]
        number = np.concatenate([[0.0], np.cumsum(weight)])
        energy = np.concatenate([[0.0], np.cumsum(weight * value**2)])
        if not energy[-1]:
            return [math.nan] * len(shares)
        sizes = [math.ceil(share * counts.sum()) for share in shares]
        return [float(np.interp(k, number, energy) / energy[-1]) for k in sizes]


def _tail(j: np.ndarray, u: np.ndarray, s: float, cell: float | None) -> np.ndarray:
    """Probability of at least j spacings u; ``cell`` is the width of the base's cell in spacings.

    None: the base lies on the grid, half a spacing from the edge.
    """
    if cell is None:
        return _erfc((j - 0.5) * u / (math.sqrt(2) * s))
    first = (j - 1) * u
    return np.clip(_excess(first, s) - _excess(first + cell * u, s), 0, cell * u) / (cell * u)


def _excess(a: np.ndarray, s: float) -> np.ndarray:
    """E[max(|d| - a, 0)]."""
    x = a / s
    density = math.sqrt(2 / math.pi) * np.exp(-(x**2) / 2)
    return s * density - a * _erfc(x / math.sqrt(2))


def _levels(u: np.ndarray, s: float, term: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Sum of term(j) over the levels j = 1, 2, ... [levels, 1] that spacings above _FINE s require."""
    j = np.arange(1.0, math.ceil(_REACH / _FINE) + 2)[:, None]
    return term(j).sum(axis=0)


def _energy(u: np.ndarray, s: float, cell: float | None) -> np.ndarray:
    """Mean of D^2 = u^2 sum_j (2 j - 1) P(at least j)."""
    if s <= 0:
        return np.zeros(len(u))
    exact = u**2 * _levels(u, s, lambda j: (2 * j - 1) * _tail(j, u, s, cell))
    limit = s**2 + u**2 * (1 / 12 if cell is None else 1 / 6)
    return np.where(u < _FINE * s, limit, exact)


def solve_null(
    counts: np.ndarray,
    energy: float,
    mantissa: int,
    on_grid: bool,
    powers: np.ndarray | None = None,
) -> Null:
    """The null whose visible energy is the observed one; s by bisection, to 1e-9 relative.

    ``counts``: weights by binade [BINS]; ``energy``: the sum of D^2; ``powers`` as in ``Null``.
    """
    unchanged = Null(s=0.0, mantissa=mantissa, on_grid=on_grid, powers=powers)
    if energy <= 0:
        return unchanged
    used, kinds = np.flatnonzero(counts), unchanged.kinds()
    u = spacings(mantissa)[used]
    rms = math.sqrt(energy / counts.sum())
    low, high = math.log(rms / 64), math.log(rms + float(u.max()) * 4)
    for _ in range(48):
        middle = (low + high) / 2
        visible = sum(
            float(
                (kind.share * counts)[used] @ _energy(u * kind.spacing, math.exp(middle), kind.cell)
            )
            for kind in kinds
        )
        if visible < energy:
            low = middle
        else:
            high = middle
    return replace(unchanged, s=math.exp((low + high) / 2))


def isotropic_spectrum(rows: int, columns: int) -> np.ndarray:
    """Singular values of a matrix of independent unit normals, largest first [min dim].

    Quantiles of the Marchenko-Pastur law, whose edge is sqrt(rows) + sqrt(columns).
    """
    short, long = sorted((rows, columns))
    low, high = math.sqrt(long) - math.sqrt(short), math.sqrt(long) + math.sqrt(short)
    angle = np.linspace(0, math.pi, 8001)
    value = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    inside = np.clip((high**2 - value**2) * (value**2 - low**2), 0, None)
    density = np.sqrt(inside) / np.maximum(value, 1e-12) * np.sin(angle)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    quantiles = (np.arange(short, 0, -1) - 0.5) / short
    return np.interp(quantiles, mass / mass[-1], value)


def noise_edge(null: Null, counts: np.ndarray, rows: int, columns: int) -> float:
    """Largest singular value of the cast's noise alone, at its mean variance."""
    variance = float(counts @ null.noise()) / max(1, int(counts.sum()))
    return math.sqrt(variance) * (math.sqrt(rows) + math.sqrt(columns))
