"""Selecting whole rows or columns of matrices instead of single weights."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from opd.checkpoint.chunks import THREADS, Chunk, ChunkReader, Progress, chunks, in_order
from opd.config.mask import MaskStructure
from opd.mask.file import index_dtype
from opd.mask.top_k import tiebreak


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """A parameter as a matrix [rows, width]; a vector is a single row or a single column.

    In tensors with more dimensions the first one counts rows (the filters of a convolution).
    """

    rows: int
    width: int
    structure: MaskStructure

    @classmethod
    def from_shape(cls, shape: tuple[int, ...], structure: MaskStructure) -> "Grid":
        """The grid of a parameter's shape."""
        size = torch.Size(shape).numel()
        vector_rows = 1 if structure == MaskStructure.rows else size
        rows = shape[0] if len(shape) > 1 else vector_rows
        return cls(rows=rows, width=size // max(rows, 1), structure=structure)

    @property
    def units(self) -> int:
        """Number of rows, or of columns."""
        return self.rows if self.structure == MaskStructure.rows else self.width

    @property
    def length(self) -> int:
        """Weights in each row, or column."""
        return self.width if self.structure == MaskStructure.rows else self.rows

    def unit(self, indices: np.ndarray) -> np.ndarray:
        """The row or column of each flat index."""
        if self.structure == MaskStructure.rows:
            return indices // self.width
        return indices % self.width

    def indices(self, units: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Sorted flat indices of the weights in sorted rows or columns."""
        units = units.astype(dtype)
        if self.structure == MaskStructure.rows:
            grid = units[:, None] * dtype.type(self.width) + np.arange(self.width, dtype=dtype)
        else:
            grid = np.arange(self.rows, dtype=dtype)[:, None] * dtype.type(self.width) + units
        return grid.reshape(-1)


class UnitSelection:
    """Selects rows or columns by the mean of their squared scores (each square keeps its sign).

    The mean, not the sum: a budget counts weights, and rows of a wide matrix use more of it. Within
    one matrix both rank alike. The best units are taken until the next one would exceed the quota, so
    that a group falls short of its quota by less than one unit.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        salt: str,
        structure: MaskStructure,
        progress: Progress,
    ) -> None:
        self._grids = {name: Grid.from_shape(shape, structure) for name, shape in shapes.items()}
        self._sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._dtype = torch.empty(0, dtype=index_dtype(shapes)).numpy().dtype
        self._salt = salt
        self._progress = progress
        self._done, self._total = 0, max(1, sum(self._sizes.values()))

    def select(
        self, names: tuple[str, ...], quota: int, scores: ChunkReader | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The kept indices of each parameter of a group, sorted."""
        grids = [self._grids[name] for name in names]
        ends = np.cumsum([grid.units for grid in grids])
        lengths = np.concatenate([np.full(grid.units, grid.length) for grid in grids])
        value = np.concatenate([self._values(name, scores) for name in names])
        ties = np.concatenate(
            [tiebreak(self._salt, name, np.arange(self._grids[name].units)) for name in names]
        )
        order = np.lexsort((ties, value))[::-1]
        fitting = int(np.searchsorted(np.cumsum(lengths[order]), quota, side="right"))
        chosen = np.zeros(len(value), bool)
        chosen[order[:fitting]] = True
        for name, grid, part in zip(names, grids, np.split(chosen, ends[:-1]), strict=True):
            yield name, torch.from_numpy(grid.indices(np.flatnonzero(part), self._dtype))

    def _values(self, name: str, scores: ChunkReader | None) -> np.ndarray:
        grid = self._grids[name]
        total = np.zeros(grid.units)
        if scores is None:
            return total

        def squares(chunk: Chunk) -> np.ndarray:
            signed = scores(chunk).astype(np.float64)
            signed *= np.abs(signed)
            unit = grid.unit(np.arange(chunk.start, chunk.stop))
            return np.bincount(unit, weights=signed, minlength=grid.units)

        parts = chunks(self._sizes, [name])
        with ThreadPoolExecutor(THREADS) as pool:
            for chunk, sums in zip(parts, in_order(pool, squares, parts), strict=True):
                total += sums
                self._done += chunk.stop - chunk.start
                self._progress("ranking units", self._done / self._total)
        return total / max(grid.length, 1)
