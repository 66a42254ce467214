"""The overlap of two masks of one base, beside the overlap that chance expects."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from opd.checkpoint.chunks import (
    BINS,
    Progress,
    binades,
    chunk_values,
    chunks,
    counts_by_binade,
    quiet,
)
from opd.checkpoint.names import place
from opd.checkpoint.tensors import Checkpoint
from opd.mask.mask import Mask, isin_sorted

LEVELS = ("global", "tensor", "binade")
"""What is fixed under chance: both densities; both counts per tensor; both per binade of each tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The overlap of two independent random masks: mean and variance of its count.

    Within a cell of n coordinates, of which a and b are kept, the count is hypergeometric: mean
    a b / n, variance mean (1 - b / n) (n - a) / (n - 1). Means and variances of cells add up.
    """

    mean: float
    variance: float

    @classmethod
    def from_counts(cls, sizes: np.ndarray, a: np.ndarray, b: np.ndarray) -> "Expected":
        """From the cells' sizes and the counts of both masks in each."""
        n = np.maximum(np.asarray(sizes, float), 1)
        mean = a * (b / n)
        variance = mean * (1 - b / n) * (n - a) / np.maximum(n - 1, 1)
        return cls(mean=float(mean.sum()), variance=float(variance.sum()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Kept coordinates of two masks in a group of parameters, and what chance expects at each level."""

    name: str
    numel: int
    a: int
    b: int
    both: int
    expected: dict[str, Expected]

    @property
    def coverage_of_a(self) -> float:
        """Share of A's coordinates that B keeps."""
        return ratio(self.both, self.a)

    @property
    def coverage_of_b(self) -> float:
        """Share of B's coordinates that A keeps."""
        return ratio(self.both, self.b)

    @property
    def jaccard(self) -> float:
        """Kept by both / kept by either."""
        return ratio(self.both, self.a + self.b - self.both)

    def expected_jaccard(self, level: str) -> float:
        """Jaccard of the expected overlap."""
        mean = self.expected[level].mean
        return ratio(mean, self.a + self.b - mean)

    def lift(self, level: str) -> float:
        """Observed / expected overlap; 1 is chance."""
        return ratio(self.both, self.expected[level].mean)

    def z(self, level: str) -> float:
        """Standard deviations above chance; NaN where chance has no variance."""
        expected = self.expected[level]
        return ratio(self.both - expected.mean, math.sqrt(max(expected.variance, 0.0)))


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskComparison:
    """Two masks: over the whole model and by module type, in the model's order."""

    whole: Overlap
    modules: tuple[Overlap, ...]


def ratio(part: float, whole: float) -> float:
    """part / whole, NaN where ``whole`` is 0."""
    return part / whole if whole else math.nan


def compare(
    a: Mask, b: Mask, base: Checkpoint | None = None, progress: Progress = quiet
) -> MaskComparison:
    """Coverage both ways, Jaccard index and their expectations, computed a tensor at a time.

    The level ``binade`` needs the base's weights. ValueError when the masks, or a mask and the base,
    do not belong together.
    """
    b.require_base(a.origin.base, a.origin.model)
    b.require_parameters(a.shapes)
    if base is not None:
        a.require_base(base.fingerprint(), base.model)
        a.require_parameters(base.parameters.shapes)
    tensors = list(_tensors(a, b, base, progress))
    modules: dict[str, list[_TensorOverlap]] = {}
    for tensor in tensors:
        modules.setdefault(place(tensor.name).module, []).append(tensor)
    return MaskComparison(
        whole=_overlap("all", tensors),
        modules=tuple(_overlap(module, members) for module, members in modules.items()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _TensorOverlap:
    """Counts of one tensor."""

    name: str
    numel: int
    a: int
    b: int
    both: int
    binade: Expected | None


def _tensors(
    a: Mask, b: Mask, base: Checkpoint | None, progress: Progress
) -> Iterator[_TensorOverlap]:
    done, total = 0, sum(a.numel(name) for name in a.shapes)
    for name in sorted(a.shapes):
        in_a, in_b = a.indices[name], b.indices[name]
        yield _TensorOverlap(
            name=name,
            numel=a.numel(name),
            a=len(in_a),
            b=len(in_b),
            both=int(isin_sorted(in_a, in_b).count_nonzero()),
            binade=None if base is None else _by_binade(base, name, in_a, in_b),
        )
        done += a.numel(name)
        progress("comparing", done / total)


def _by_binade(base: Checkpoint, name: str, a: torch.Tensor, b: torch.Tensor) -> Expected:
    stored = base[name]
    sizes = np.zeros(BINS, np.int64)
    for chunk in chunks({name: stored.numel}, [name]):
        sizes += np.bincount(binades(chunk_values(stored, chunk)), minlength=BINS)
    return Expected.from_counts(sizes, counts_by_binade(stored, a), counts_by_binade(stored, b))


def _overlap(name: str, tensors: list[_TensorOverlap]) -> Overlap:
    sizes, a, b = np.array([(t.numel, t.a, t.b) for t in tensors], float).T
    expected = {
        "global": Expected.from_counts(*(np.array([values.sum()]) for values in (sizes, a, b))),
        "tensor": Expected.from_counts(sizes, a, b),
    }
    binade = [tensor.binade for tensor in tensors if tensor.binade is not None]
    if binade:
        expected["binade"] = Expected(
            mean=sum(e.mean for e in binade), variance=sum(e.variance for e in binade)
        )
    return Overlap(
        name=name,
        numel=int(sizes.sum()),
        a=int(a.sum()),
        b=int(b.sum()),
        both=sum(tensor.both for tensor in tensors),
        expected=expected,
    )
