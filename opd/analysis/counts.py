"""What a tensor's coordinates show one by one: norms, sparsity, spacings moved, binades."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from opd.analysis.largest import Largest, counted, large_first
from opd.analysis.sides import CHUNK, NumberFormat, Sides, UpdateChunk
from opd.checkpoint.chunks import BINS, binades

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
RELATIVE = (1e-4, 1e-3, 1e-2)
"""Thresholds in units of rms(W0)."""
TOP = (0.001, 0.01, 0.05)
"""Shares of the coordinates whose energy is added up."""
VISIBLE = 1e-5
"""abs(D) above this is the paper's changed."""
VISIBLE_KEY = int(large_first(np.array([VISIBLE], np.float32))[0])
"""Keys of ``large_first`` above this one are those of float32 numbers above VISIBLE."""
assert float(np.float32(VISIBLE)) < VISIBLE
RULE = 1e-3
"""abs(D) <= 1e-3 max(|w|, |w'|) is bitwise equality of bfloat16."""
ULPS = 18
"""Buckets of spacings moved: 0, 1, 2, 3-4, 5-8, ... doubling."""


@dataclass(slots=True, kw_only=True)
class Counts:
    """Sums over a tensor; energies are sums of squares, the rest numbers of coordinates.

    ``below``: abs(D) < THRESHOLDS; ``relative_below``: abs(D) < RELATIVE x rms(W0); ``top``: energy
    of the ceil(share x n) largest abs(D); ``binades`` [3, BINS]: weights, those with abs(D) > 0, and
    with abs(D) > VISIBLE.
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


def bad_numbers(sides: Sides) -> str:
    """What is wrong with the values: NaN or infinity on either side; empty when they are sound."""
    told = []
    for side, tensor in (("base", sides.base), ("trained model", sides.trained)):
        parts = tensor.reshape(-1).split(CHUNK)
        found = sum(int((~torch.isfinite(part)).sum()) for part in parts)
        if found:
            told.append(f"{found} NaN or infinite values in the {side}")
    return ", ".join(told)


def on_bf16_grid(base: torch.Tensor) -> bool:
    """Whether every weight is a bfloat16 number, whatever it is stored in."""
    if base.dtype == torch.bfloat16:
        return True
    parts = base.reshape(-1).split(CHUNK)
    return all(torch.equal(p.bfloat16().float(), p.float()) for p in parts)


def count(sides: Sides) -> Counts:
    """One pass over a tensor of finite numbers; a second where D is finer than bfloat16.

    The upper 16 bits of abs(D) are its whole value in bfloat16, so that a histogram of them holds
    every threshold and the largest moves; finer values are compared one by one.
    """
    energy = sum(_squares(cut.float()) for cut in sides.base_chunks())
    counts = Counts(numel=sides.numel, base_energy=energy)
    histogram = np.zeros(1 << 16, np.int64)
    for part, cut in sides.flat():
        moved = large_first(cut.update.numpy())
        kind = (moved > 0).astype(np.int32)
        kind += moved > VISIBLE_KEY
        cells = np.bincount(kind * np.int32(BINS) + binades(cut.base), minlength=3 * BINS)
        counts.binades += cells.reshape(3, BINS)
        histogram += counted(moved)
        _count_changed(sides, part, cut, counts)
    counts.binades = counts.binades[::-1].cumsum(axis=0)[::-1]
    if sides.is_bf16:
        _from_histogram(counts, histogram)
    else:
        _one_by_one(sides, counts, histogram)
    return counts


def _squares(values: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64) ** 2)


def _count_changed(sides: Sides, part: slice, cut: UpdateChunk, counts: Counts) -> None:
    """Bits that differ, the relative rule, and spacings moved; nothing else needs a look."""
    before, after = (t.reshape(-1)[part] for t in (sides.base, sides.trained))
    before, after = sides.pair(before, after)
    kind = {2: torch.int16, 4: torch.int32}[before.element_size()]
    bits = [t.contiguous().view(kind).numpy() for t in (before, after)]
    at = np.flatnonzero(bits[0] != bits[1])
    counts.bitwise += len(at)
    larger = torch.maximum(cut.base.abs(), cut.trained.abs()).numpy()[at]
    moved = np.abs(cut.update.numpy()[at])
    counts.rule += int((moved > RULE * larger.astype(np.float64)).sum())
    lines = []
    for b in bits:
        wide = b[at].astype(np.int64)
        magnitude = wide & ((1 << (8 * b.itemsize - 1)) - 1)
        lines.append(np.where(wide < 0, -magnitude, magnitude))
    spaces = np.abs(lines[1] - lines[0])
    counts.ulps += _buckets(spaces)
    counts.ulps[0] += len(before) - len(at)


def _from_histogram(counts: Counts, histogram: np.ndarray) -> None:
    """Of a D in bfloat16: bin b holds the value with the upper bits b."""
    used = np.flatnonzero(histogram)[::-1]
    number = histogram[used]
    value = (used.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    squares, passed = number * value**2, number.cumsum()
    rms = math.sqrt(counts.base_energy / counts.numel)
    counts.energy, counts.largest = float(squares.sum()), float(value[0])
    counts.zero = int(number[value == 0].sum())
    counts.below += [int(number[value < t].sum()) for t in THRESHOLDS]
    counts.relative_below += [int(number[value < t * rms].sum()) for t in RELATIVE]
    for i, share in enumerate(TOP):
        wanted = math.ceil(share * counts.numel)
        last = int(np.searchsorted(passed, wanted))
        spare = passed[last] - wanted
        counts.top[i] = squares[: last + 1].sum() - spare * value[last] ** 2


def _one_by_one(sides: Sides, counts: Counts, histogram: np.ndarray) -> None:
    rms = math.sqrt(counts.base_energy / counts.numel)
    tops = [Largest(math.ceil(share * sides.numel)) for share in TOP]
    for top in tops:
        top.add(histogram)
    for part, cut in sides.flat():
        moved = cut.update.abs()
        counts.energy += _squares(moved)
        counts.largest = max(counts.largest, float(moved.max()))
        exact = moved.double().numpy()
        counts.zero += int((exact == 0).sum())
        counts.below += [int((exact < t).sum()) for t in THRESHOLDS]
        counts.relative_below += [int((exact < t * rms).sum()) for t in RELATIVE]
        keys = large_first(moved.numpy())
        for i, top in enumerate(tops):
            counts.top[i] += _squares(moved[torch.from_numpy(top.certain(keys, part.start))])
    for i, top in enumerate(tops):
        edge = top.boundary().view(np.float32).astype(np.float64)
        counts.top[i] += float((edge**2).sum())


def _buckets(spaces: np.ndarray) -> np.ndarray:
    """Counts by spacings moved: 0, 1, 2, 3-4, 5-8, ...; the last bucket holds the rest."""
    bucket = np.frexp((spaces - 1).clip(0).astype(np.float32))[1] + (spaces > 0)
    return np.bincount(np.minimum(bucket, ULPS - 1), minlength=ULPS)


def visible_and_true(base: torch.Tensor, trained: torch.Tensor) -> dict[str, float]:
    """Energy of the bf16-visible update over the stored one's, and the cosine of the two."""
    seen = true = both = 0.0
    bf16 = Sides(base=base, trained=trained, precision=NumberFormat.bf16)
    stored = Sides(base=base, trained=trained, precision=NumberFormat.stored)
    for (_, a), (_, b) in zip(bf16.flat(), stored.flat(), strict=True):
        x, y = a.update.double(), b.update.double()
        seen, true, both = seen + float(x @ x), true + float(y @ y), both + float(x @ y)
    lengths = math.sqrt(seen * true)
    return {
        "energy_ratio": seen / true if true else math.nan,
        "cosine": both / lengths if lengths else math.nan,
        "true_energy": true,
    }
