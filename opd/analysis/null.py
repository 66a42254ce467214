"""The null model: an isotropic normal update, independent of the weights, cast to a number format.

A weight w whose neighbours are one spacing u = 2^(floor(log2|w|) - mantissa) away, changed by
d ~ N(0, s^2), shows a change of at least j spacings with probability erfc((j - 1/2) u / (sqrt(2) s))
if the base lies on the format's grid. A base between grid points (float32 that was never rounded) is
taken as uniform in its cell: E[clip(|d| / u - (j - 1), 0, 1)]. The lower neighbour of a power of two is
only u / 2 away; in a binade these are 3/4 of a cell in 2^mantissa, and half of their steps go down. So a
probability f(u) becomes (1 - h) f(u) + h f(u / 2), h = 3/8 2^-mantissa. Everything depends only on the
weight's binade, so a tensor is described by its counts by binade.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

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
class Null:
    """Probabilities of the null at standard deviation ``s`` per weight, for every binade [BINS]."""

    s: float
    mantissa: int
    on_grid: bool

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
        return self._mean(lambda u: _tail(level(u), u, self.s, self.on_grid))

    def _mean(self, value: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Mean of a function of the spacing, over weights on and off powers of two, [BINS]."""
        u, half = spacings(self.mantissa), _half_share(self.mantissa, self.on_grid)
        return (1 - half) * value(u) + half * value(u / 2)

    def energy(self) -> np.ndarray:
        """Mean of D^2."""
        return self._mean(lambda u: _energy(u, self.s, self.on_grid))

    def noise(self) -> np.ndarray:
        """Mean of (D - d)^2: the rounding noise of the cast."""
        return self._mean(self._noise) if self.s > 0 else np.zeros(BINS)

    def _noise(self, u: np.ndarray) -> np.ndarray:
        s = self.s
        if not self.on_grid:
            return np.minimum(u**2 / 6, s**2)
        scale = math.sqrt(2 / math.pi) * s
        cross = u * _levels(u, s, lambda j: scale * np.exp(-(((j - 0.5) * u / s) ** 2) / 2))
        exact = _energy(u, s, True) - 2 * cross + s**2
        return np.where(u < _FINE * s, u**2 / 12, np.maximum(exact, 0.0))

    def concentration(self, counts: np.ndarray, shares: tuple[float, ...]) -> list[float]:
        """Share of the energy in the ceil(share x n) coordinates that changed most, for each share."""
        if self.s <= 0:
            return [math.nan] * len(shares)
        values, weights = [], []
        half = _half_share(self.mantissa, self.on_grid)
        spacing_shares = ((1.0, 1 - half), (0.5, half))
        for bin, (part, share) in itertools.product(np.flatnonzero(counts), spacing_shares):
            u = max(part * spacings(self.mantissa)[bin], self.s * _COARSEST)
            j = np.arange(1, math.ceil(_REACH * self.s / u) + 2)
            chance = _tail(j.astype(float), np.full(len(j), u), self.s, self.on_grid)
            values.append(j * u)
            weights.append(share * counts[bin] * -np.diff(np.append(chance, 0.0)))
        value, weight = np.concatenate(values), np.concatenate(weights)
        order = np.argsort(-value)
        value, weight = value[order], weight[order]
        number = np.concatenate([[0.0], np.cumsum(weight)])
        energy = np.concatenate([[0.0], np.cumsum(weight * value**2)])
        if not energy[-1]:
            return [math.nan] * len(shares)
        sizes = [math.ceil(share * counts.sum()) for share in shares]
        return [float(np.interp(k, number, energy) / energy[-1]) for k in sizes]


def _half_share(mantissa: int, on_grid: bool) -> float:
    """Share of steps down from a power of two, for which the next number is half as far."""
    return 0.375 * 2.0**-mantissa if on_grid else 0.0


def _tail(j: np.ndarray, u: np.ndarray, s: float, on_grid: bool) -> np.ndarray:
    """Probability of at least j spacings u."""
    if on_grid:
        return _erfc((j - 0.5) * u / (math.sqrt(2) * s))
    return np.clip(_excess((j - 1) * u, s) - _excess(j * u, s), 0, u) / u


def _excess(a: np.ndarray, s: float) -> np.ndarray:
    """E[max(|d| - a, 0)]."""
    x = a / s
    density = math.sqrt(2 / math.pi) * np.exp(-(x**2) / 2)
    return s * density - a * _erfc(x / math.sqrt(2))


def _levels(u: np.ndarray, s: float, term: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Sum of term(j) over the levels j = 1, 2, ... [levels, 1] that spacings above _FINE s require."""
    j = np.arange(1.0, math.ceil(_REACH / _FINE) + 2)[:, None]
    return term(j).sum(axis=0)


def _energy(u: np.ndarray, s: float, on_grid: bool) -> np.ndarray:
    """Mean of D^2 = u^2 sum_j (2 j - 1) P(at least j)."""
    if s <= 0:
        return np.zeros(len(u))
    exact = u**2 * _levels(u, s, lambda j: (2 * j - 1) * _tail(j, u, s, on_grid))
    limit = s**2 + u**2 * (1 / 12 if on_grid else 1 / 6)
    return np.where(u < _FINE * s, limit, exact)


def solve_null(counts: np.ndarray, energy: float, mantissa: int, on_grid: bool) -> Null:
    """The null whose visible energy is the observed one; s by bisection, to 1e-9 relative.

    ``counts``: weights by binade [BINS]; ``energy``: the sum of D^2.
    """
    if energy <= 0:
        return Null(s=0.0, mantissa=mantissa, on_grid=on_grid)
    used, half = np.flatnonzero(counts), _half_share(mantissa, on_grid)
    u = np.concatenate([spacings(mantissa)[used], spacings(mantissa)[used] / 2])
    n = np.concatenate([(1 - half) * counts[used], half * counts[used]])
    rms = math.sqrt(energy / counts.sum())
    low, high = math.log(rms / 64), math.log(rms + float(u.max()) * 4)
    for _ in range(48):
        middle = (low + high) / 2
        if float(n @ _energy(u, math.exp(middle), on_grid)) < energy:
            low = middle
        else:
            high = middle
    return Null(s=math.exp((low + high) / 2), mantissa=mantissa, on_grid=on_grid)


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
