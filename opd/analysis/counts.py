"""Counts over a tensor's coordinates: norms, sparsity, spacings moved, binades."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from opd.analysis.largest import Largest, count_keys, magnitude_keys
from opd.analysis.sides import CHUNK, NumberFormat, Sides, UpdateChunk
from opd.checkpoint.chunks import BINS, binades

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
RELATIVE = (1e-4, 1e-3, 1e-2)
"""Thresholds in units of rms(W0)."""
TOP = (0.001, 0.01, 0.05)
"""Shares of the coordinates for which the energy of the largest changes is summed."""
VISIBLE = 1e-5
"""Threshold of abs(D) above which the paper counts a coordinate as changed."""
VISIBLE_KEY = int(magnitude_keys(np.array([VISIBLE], np.float32))[0])
"""A key of ``magnitude_keys`` is above this one where the float32 number is above VISIBLE."""
assert float(np.float32(VISIBLE)) < VISIBLE
RULE = 1e-3
"""abs(D) <= 1e-3 max(|w|, |w'|) is equivalent to bitwise equality in bfloat16."""
ULPS = 18
"""Buckets of spacings moved: 0, 1, 2, 3-4, 5-8, ... doubling."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """Counts and sums over a tensor; energies are sums of squares, the rest counts of coordinates.

    ``below``: abs(D) < THRESHOLDS; ``relative_below``: abs(D) < RELATIVE x rms(W0); ``top``: energy
    of the ceil(share x n) largest abs(D); ``binades`` [3, BINS]: weights, those with abs(D) > 0, and
    with abs(D) > VISIBLE; ``powers`` [BINS]: weights that are powers of two.
    """

    numel: int
    base_energy: float
    energy: float = 0.0
    largest: float = 0.0
    zero: int = 0
    bitwise: int = 0
    rule: int = 0
    below: np.ndarray = field(default_factory=lambda: np.zeros(len(THRESHOLDS), np.int64))
    relative_below: np.ndarray = field(default_factory=lambda: np.zeros(len(RELATIVE), np.int64))
    ulps: np.ndarray = field(default_factory=lambda: np.zeros(ULPS, np.int64))
    top: np.ndarray = field(default_factory=lambda: np.zeros(len(TOP)))
    binades: np.ndarray = field(default_factory=lambda: np.zeros((3, BINS), np.int64))
    powers: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))


def describe_non_finite(sides: Sides) -> str:
    """An error text that counts NaN and infinite values on either side; empty without any."""
    problems = []
    for side, tensor in (("base", sides.base), ("trained model", sides.trained)):
        parts = tensor.reshape(-1).split(CHUNK)
        found = sum(int((~torch.isfinite(part)).sum()) for part in parts)
        if found:
            problems.append(f"{found} NaN or infinite values in the {side}")
    return ", ".join(problems)


def on_bf16_grid(base: torch.Tensor) -> bool:
    """Whether every weight is exactly a bfloat16 number, whatever its dtype."""
    if base.dtype == torch.bfloat16:
        return True
    parts = base.reshape(-1).split(CHUNK)
    return all(torch.equal(p.bfloat16().float(), p.float()) for p in parts)


def count(sides: Sides) -> Counts:
    """Counts of a tensor of finite numbers, in one pass; in two where D is finer than bfloat16.

    The upper 16 bits of abs(D) are its whole value in bfloat16, so a histogram of them answers every
    threshold and the largest changes; finer values are compared one by one.
    """
    energy = sum(_squares(chunk.float()) for chunk in sides.base_chunks())
    counts = Counts(numel=sides.numel, base_energy=energy)
    histogram = np.zeros(1 << 16, np.int64)
    for part, chunk in sides.flat():
        moved = magnitude_keys(chunk.update.numpy())
        kind = (moved > 0).astype(np.int32)
        kind += moved > VISIBLE_KEY
        bins = binades(chunk.base)
        cells = np.bincount(kind * np.int32(BINS) + bins, minlength=3 * BINS)
        counts.binades += cells.reshape(3, BINS)
        counts.powers += np.bincount(bins[_are_powers_of_two(chunk.base)], minlength=BINS)
        histogram += count_keys(moved)
        _count_changed(sides, part, chunk, counts)
    counts.binades = counts.binades[::-1].cumsum(axis=0)[::-1]
    if sides.is_bf16:
        _from_histogram(counts, histogram)
    else:
        _from_values(sides, counts, histogram)
    return counts


def _are_powers_of_two(values: torch.Tensor) -> np.ndarray:
    """Whether each float32 number is 2^n or -2^n."""
    bits = values.numpy().view(np.uint32)
    return (bits & np.uint32(0x7FFFFF) == 0) & (bits & np.uint32(0x7FFFFFFF) != 0)


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64) ** 2)


def _count_changed(sides: Sides, part: slice, chunk: UpdateChunk, counts: Counts) -> None:
    """Count differing bits, the relative rule and spacings moved, at coordinates whose bits differ."""
    before, after = (t.reshape(-1)[part] for t in (sides.base, sides.trained))
    before, after = sides.pair(before, after)
    kind = {2: torch.int16, 4: torch.int32}[before.element_size()]
    bits = [t.contiguous().view(kind).numpy() for t in (before, after)]
    changed = np.flatnonzero(bits[0] != bits[1])
    counts.bitwise += len(changed)
    larger = torch.maximum(chunk.base.abs(), chunk.trained.abs()).numpy()[changed]
    moved = np.abs(chunk.update.numpy()[changed])
    counts.rule += int((moved > RULE * larger.astype(np.float64)).sum())
    orders = []
    for b in bits:
        wide = b[changed].astype(np.int64)
        magnitude = wide & ((1 << (8 * b.itemsize - 1)) - 1)
        orders.append(np.where(wide < 0, -magnitude, magnitude))
    spacings = np.abs(orders[1] - orders[0])
    counts.ulps += _buckets(spacings)
    counts.ulps[0] += len(before) - len(changed)


def _from_histogram(counts: Counts, histogram: np.ndarray) -> None:
    """Counts of a D in bfloat16 from the histogram of its upper 16 bits."""
    used = np.flatnonzero(histogram)[::-1]
    counts_per_value = histogram[used]
    value = (used.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    squares, passed = counts_per_value * value**2, counts_per_value.cumsum()
    rms = math.sqrt(counts.base_energy / counts.numel)
    counts.energy, counts.largest = float(squares.sum()), float(value[0])
    counts.zero = int(counts_per_value[value == 0].sum())
    counts.below += [int(counts_per_value[value < t].sum()) for t in THRESHOLDS]
    counts.relative_below += [int(counts_per_value[value < t * rms].sum()) for t in RELATIVE]
    for i, share in enumerate(TOP):
        size = math.ceil(share * counts.numel)
        last = int(np.searchsorted(passed, size))
        excess = passed[last] - size
        counts.top[i] = squares[: last + 1].sum() - excess * value[last] ** 2


def _from_values(sides: Sides, counts: Counts, histogram: np.ndarray) -> None:
    rms = math.sqrt(counts.base_energy / counts.numel)
    tops = [Largest(math.ceil(share * sides.numel)) for share in TOP]
    for top in tops:
        top.add(histogram)
    for part, chunk in sides.flat():
        moved = chunk.update.abs()
        counts.energy += _squares(moved)
        counts.largest = max(counts.largest, float(moved.max()))
        exact = moved.double().numpy()
        counts.zero += int((exact == 0).sum())
        counts.below += [int((exact < t).sum()) for t in THRESHOLDS]
        counts.relative_below += [int((exact < t * rms).sum()) for t in RELATIVE]
        keys = magnitude_keys(moved.numpy())
        for i, top in enumerate(tops):
            counts.top[i] += _squares(moved[torch.from_numpy(top.select_above(keys, part.start))])
    for i, top in enumerate(tops):
        tied = top.tied_keys().view(np.float32).astype(np.float64)
        counts.top[i] += float((tied**2).sum())


def _buckets(spacings: np.ndarray) -> np.ndarray:
    """Counts by spacings moved: 0, 1, 2, 3-4, 5-8, ...; the last bucket holds the rest."""
    bucket = np.frexp((spacings - 1).clip(0).astype(np.float32))[1] + (spacings > 0)
    return np.bincount(np.minimum(bucket, ULPS - 1), minlength=ULPS)


def compare_visible(base: torch.Tensor, trained: torch.Tensor) -> dict[str, float]:
    """Energy of the bf16-visible update / the stored one, and the cosine of the two."""
    visible = true = both = 0.0
    bf16 = Sides(base=base, trained=trained, precision=NumberFormat.bf16)
    stored = Sides(base=base, trained=trained, precision=NumberFormat.stored)
    for (_, a), (_, b) in zip(bf16.flat(), stored.flat(), strict=True):
        x, y = a.update.double(), b.update.double()
        visible, true, both = visible + float(x @ x), true + float(y @ y), both + float(x @ y)
    lengths = math.sqrt(visible * true)
    return {
        "energy_ratio": visible / true if true else math.nan,
        "cosine": both / lengths if lengths else math.nan,
        "true_energy": true,
    }
