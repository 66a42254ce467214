"""One tensor before and after training, and the difference, read a chunk at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import torch

CHUNK = 1 << 17
"""Coordinates processed together: a few MiB of temporaries."""


class NumberFormat(StrEnum):
    """The number format of the comparison.

    ``bf16``: both sides are cast to bfloat16 and subtracted in it, as in the paper. ``stored``: both
    as stored in the files, subtracted in float32; two bfloat16 sides are the same as ``bf16``.
    """

    bf16 = "bf16"
    stored = "stored"


@dataclass(frozen=True, slots=True)
class UpdateChunk:
    """W0, W1 and D = W1 - W0 of a chunk of coordinates, float32."""

    base: torch.Tensor
    trained: torch.Tensor
    update: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Sides:
    """A tensor before and after, as stored and memory-mapped: memory is that of a chunk."""

    base: torch.Tensor
    trained: torch.Tensor
    precision: NumberFormat

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.base.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of a matrix."""
        rows, columns = self.base.shape
        return rows, columns

    @property
    def is_bf16(self) -> bool:
        """Whether D consists of bfloat16 numbers."""
        return self.precision == NumberFormat.bf16

    @property
    def mantissa(self) -> int:
        """Mantissa bits of the format to which the update was rounded."""
        dtype = torch.bfloat16 if self.is_bf16 else self.trained.dtype
        return MANTISSA.get(dtype, MANTISSA[torch.float32])

    def pair(self, base: torch.Tensor, trained: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates of both sides in the format of the comparison."""
        if self.precision == NumberFormat.bf16:
            return base.bfloat16(), trained.bfloat16()
        if base.dtype == trained.dtype and base.dtype in MANTISSA:
            return base, trained
        return base.float(), trained.float()

    def _chunk(self, base: torch.Tensor, trained: torch.Tensor) -> UpdateChunk:
        before, after = self.pair(base, trained)
        if self.precision == NumberFormat.bf16:
            return UpdateChunk(before.float(), after.float(), (after - before).float())
        return UpdateChunk(before.float(), after.float(), after.float() - before.float())

    def flat(self) -> Iterator[tuple[slice, UpdateChunk]]:
        """Chunks of flat coordinates, in order."""
        before, after = self.base.reshape(-1), self.trained.reshape(-1)
        for start in range(0, self.numel, CHUNK):
            part = slice(start, min(start + CHUNK, self.numel))
            yield part, self._chunk(before[part], after[part])

    def base_chunks(self) -> Iterator[torch.Tensor]:
        """Chunks of W0 alone, flat, in the format of the comparison."""
        for part in self.base.reshape(-1).split(CHUNK):
            yield self.pair(part, part)[0]

    def rows(self) -> Iterator[tuple[slice, UpdateChunk]]:
        """Chunks of rows of a matrix, in order."""
        step = max(1, CHUNK // self.shape[1])
        for start in range(0, self.shape[0], step):
            part = slice(start, min(start + step, self.shape[0]))
            yield part, self._chunk(self.base[part], self.trained[part])

    def tall(self) -> Iterator[UpdateChunk]:
        """Chunks [n, shorter side] along the longer side of the matrix, which is transposed if wide."""
        rows, columns = self.shape
        before, after = self.base, self.trained
        if columns > rows:
            before, after = before.T, after.T
        step = max(1, CHUNK // min(rows, columns), min(rows, columns) // 8)
        for start in range(0, max(rows, columns), step):
            yield self._chunk(before[start : start + step], after[start : start + step])


MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}
