"""Changed coordinates by the principal and the low-magnitude mask of W0, counted by binade."""

import math
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np
import torch

from opd.analysis.counts import VISIBLE_KEY
from opd.analysis.largest import Largest, count_keys, inverse_magnitude_keys, magnitude_keys
from opd.analysis.sides import Sides, UpdateChunk
from opd.analysis.spectrum import RANKS, Directions, principal_rank
from opd.checkpoint.chunks import BINS, binades

MASKS = {
    "principal": (False, True, False, True),
    "low_magnitude": (False, False, True, True),
    "principal_not_low": (False, True, False, False),
    "nonprincipal_or_low": (True, False, True, True),
}
"""Which of the four classes of coordinates, neither | principal | low | both, each mask contains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskCounts:
    """Counts [3: unchanged | changed but not above 1e-5 | above, 4 classes, BINS] for a share r."""

    share: float
    table: np.ndarray

    def counts_inside(self, mask: str) -> np.ndarray:
        """Numbers of coordinates inside a mask, [3, BINS]."""
        return self.table[:, list(MASKS[mask])].sum(axis=1)


def locate_changes(sides: Sides, directions: Directions | None) -> list[MaskCounts]:
    """Count changed coordinates inside the masks, for each share r of RANKS.

    Principal: the ceil(r n) largest abs(P), P the rank floor(r min dim) reconstruction of W0; low
    magnitude: the ceil(r n) smallest abs(W0). Ties are broken by row-major order. Without directions
    no coordinate is principal. The masks are the bits of one byte per weight.
    """
    # mapped, so that the memory returns to the system and malloc keeps no pool of this size
    flags = np.frombuffer(mmap(-1, sides.numel, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.uint8)
    counts = [math.ceil(share * sides.numel) for share in RANKS]
    low = [Largest(count) for count in counts]
    principal = [Largest(count) for count in counts if directions is not None]
    reconstruction = None if directions is None else Reconstruction(sides, directions)
    for part, chunk in sides.rows():
        bins = count_keys(inverse_magnitude_keys(chunk.base.reshape(-1).numpy()))
        for largest in low:
            largest.add(bins)
        for largest, keys in zip(
            principal, _reconstruction_keys(reconstruction, part, chunk), strict=True
        ):
            largest.add(count_keys(keys))
    for part, chunk in sides.rows():
        start, stop = part.start * sides.shape[1], part.stop * sides.shape[1]
        smallest = inverse_magnitude_keys(chunk.base.reshape(-1).numpy())
        for i, keys in enumerate(_reconstruction_keys(reconstruction, part, chunk)):
            flags[start:stop] |= principal[i].select_above(keys, start).astype(np.uint8) << i
        for i, largest in enumerate(low):
            flags[start:stop] |= largest.select_above(smallest, start).astype(np.uint8) << (i + 4)
    for shift, masks in ((0, principal), (4, low)):
        for i, largest in enumerate(masks):
            flags[largest.select_tied()] |= np.uint8(1 << (i + shift))
    return _tables(sides, flags)


def _tables(sides: Sides, flags: np.ndarray) -> list[MaskCounts]:
    width, shares = 3 * BINS, len(RANKS)
    cells = np.zeros(256 * width, np.int64)
    for part, chunk in sides.flat():
        keys = magnitude_keys(chunk.update.numpy())
        cell = flags[part].astype(np.int32) * np.int32(width) + binades(chunk.base)
        cell += (keys > 0) * np.int32(BINS)
        cell += (keys > VISIBLE_KEY) * np.int32(BINS)
        cells += np.bincount(cell, minlength=len(cells))
    by_flags = cells.reshape(256, 3, BINS)
    found = []
    for i, share in enumerate(RANKS):
        label = ((np.arange(256) >> i) & 1) + 2 * ((np.arange(256) >> (i + shares)) & 1)
        table = np.stack([by_flags[label == k].sum(axis=0) for k in range(4)], axis=1)
        found.append(MaskCounts(share=share, table=table))
    return found


def _reconstruction_keys(
    reconstruction: "Reconstruction | None", part: slice, chunk: UpdateChunk
) -> list[np.ndarray]:
    return [] if reconstruction is None else reconstruction.keys(part, chunk.base)


class Reconstruction:
    """abs(P) of rows of W0 for every rank, from the leading directions; float32."""

    def __init__(self, sides: Sides, directions: Directions) -> None:
        rows, columns = sides.shape
        self._ranks = [principal_rank(share, min(rows, columns)) for share in RANKS]
        self._short = directions.short.float()
        self._is_tall = rows >= columns
        self._onto = self._short.T
        if not self._is_tall:  # P = U_k (U_k^T W0)
            self._onto = torch.zeros(self._short.shape[1], columns)
            for part, chunk in sides.rows():
                self._onto.addmm_(self._short[part].T, chunk.base)

    def keys(self, part: slice, base: torch.Tensor) -> list[np.ndarray]:
        """Magnitude keys of some rows, flat, for each share of RANKS."""
        along = base @ self._short if self._is_tall else self._short[part]
        rows, found, done = torch.zeros_like(base), [], 0
        for rank in self._ranks:
            rows.addmm_(along[:, done:rank], self._onto[done:rank])
            found.append(magnitude_keys(rows.reshape(-1).numpy()))
            done = rank
        return found
