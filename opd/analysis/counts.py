"""What a tensor's coordinates show one by one: norms, sparsity, spacings moved, binades."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from opd.analysis.select import Largest, counted, large_first
from opd.analysis.sides import Precision, Sides
from opd.mask.pieces import BINS, binades

THRESHOLDS = (1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
RELATIVE = (1e-4, 1e-3, 1e-2)
"""Thresholds in units of rms(W0)."""
TOP = (0.001, 0.01, 0.05)
"""Shares of the coordinates whose energy is added up."""
VISIBLE = 1e-5
"""abs(D) above this is the paper's changed."""
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
        found = sum(
            int((~torch.isfinite(part)).sum()) for part in tensor.reshape(-1).split(1 << 20)
        )
        if found:
            told.append(f"{found} NaN or infinite values in the {side}")
    return ", ".join(told)


def on_bf16_grid(base: torch.Tensor) -> bool:
    """Whether every weight is a bfloat16 number, whatever it is stored in."""
    if base.dtype == torch.bfloat16:
        return True
    parts = base.reshape(-1).split(1 << 20)
    return all(torch.equal(p.bfloat16().float(), p.float()) for p in parts)


def count(sides: Sides) -> Counts:
    """Two passes over a tensor of finite numbers: one for rms(W0), one for everything else."""
    energy = sum(float((cut.base.double() ** 2).sum()) for _, cut in sides.flat())
    counts = Counts(numel=sides.numel, base_energy=energy)
    rms = math.sqrt(energy / sides.numel)
    tops = [Largest(math.ceil(share * sides.numel)) for share in TOP]
    for part, cut in sides.flat():
        moved = cut.update.abs().numpy()
        exact = moved.astype(np.float64)
        counts.energy += float(exact @ exact)
        counts.largest = max(counts.largest, float(moved.max()))
        changed, visible = moved > 0, exact > VISIBLE
        counts.zero += len(moved) - int(changed.sum())
        for i, threshold in enumerate(THRESHOLDS):
            counts.below[i] += int((exact < threshold).sum())
        for i, threshold in enumerate(RELATIVE):
            counts.relative_below[i] += int((exact < threshold * rms).sum())
        larger = np.maximum(np.abs(cut.base.numpy()), np.abs(cut.trained.numpy()))
        counts.rule += int((exact > RULE * larger.astype(np.float64)).sum())
        bins = binades(cut.base)
        counts.binades[0] += np.bincount(bins, minlength=BINS)
        counts.binades[1] += np.bincount(bins[changed], minlength=BINS)
        counts.binades[2] += np.bincount(bins[visible], minlength=BINS)
        spaces = _spaces(sides, part)
        counts.bitwise += int((spaces[1] != 0).sum())
        counts.ulps += _buckets(spaces[0])
        bins = counted(large_first(moved))
        for top in tops:
            top.add(bins)
    _add_top_energy(sides, counts, tops)
    return counts


def _add_top_energy(sides: Sides, counts: Counts, tops: list[Largest]) -> None:
    for part, cut in sides.flat():
        moved = cut.update.abs().numpy()
        keys = large_first(moved)
        for i, top in enumerate(tops):
            inside = top.certain(keys, part.start)
            counts.top[i] += float((moved[inside].astype(np.float64) ** 2).sum())
    for i, top in enumerate(tops):
        edge = top.boundary().view(np.float32).astype(np.float64)
        counts.top[i] += float((edge**2).sum())


def _spaces(sides: Sides, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """How many numbers of the format each weight moved, and whether any bit changed."""
    before, after = (t.reshape(-1)[part] for t in (sides.base, sides.trained))
    before, after = sides.pair(before, after)
    kind = {2: torch.int16, 4: torch.int32}[before.element_size()]
    bits = [t.contiguous().view(kind).numpy() for t in (before, after)]
    lines = []
    for b in bits:
        wide = b.astype(np.int64)
        magnitude = wide & ((1 << (8 * b.itemsize - 1)) - 1)
        lines.append(np.where(wide < 0, -magnitude, magnitude))
    return np.abs(lines[1] - lines[0]), bits[0] ^ bits[1]


def _buckets(spaces: np.ndarray) -> np.ndarray:
    """Counts by spacings moved: 0, 1, 2, 3-4, 5-8, ...; the last bucket holds the rest."""
    moved = spaces[spaces > 0]
    bucket = np.minimum(1 + np.frexp((moved - 1).astype(float))[1], ULPS - 1)
    counts = np.bincount(bucket, minlength=ULPS)
    counts[0] = len(spaces) - len(moved)
    return counts


def visible_and_true(base: torch.Tensor, trained: torch.Tensor) -> dict[str, float]:
    """Energy of the bf16-visible update over the stored one's, and the cosine of the two."""
    seen = true = both = 0.0
    bf16 = Sides(base=base, trained=trained, precision=Precision.bf16)
    stored = Sides(base=base, trained=trained, precision=Precision.stored)
    for (_, a), (_, b) in zip(bf16.flat(), stored.flat(), strict=True):
        x, y = a.update.double(), b.update.double()
        seen, true, both = seen + float(x @ x), true + float(y @ y), both + float(x @ y)
    lengths = math.sqrt(seen * true)
    return {
        "energy_ratio": seen / true if true else math.nan,
        "cosine": both / lengths if lengths else math.nan,
        "true_energy": true,
    }
