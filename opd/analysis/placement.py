"""Where in W0 the changed coordinates lie: principal and low-magnitude masks, coverage by binade."""

import math
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import numpy as np
import torch

from opd.analysis.counts import VISIBLE_KEY
from opd.analysis.largest import Largest, counted, large_first, small_first
from opd.analysis.sides import Sides, UpdateChunk
from opd.analysis.spectrum import RANKS, Directions, rank_of
from opd.checkpoint.chunks import BINS, binades

MASKS = {
    "principal": (False, True, False, True),
    "low_magnitude": (False, False, True, True),
    "principal_not_low": (False, True, False, False),
    "nonprincipal_or_low": (True, False, True, True),
}
"""Which of the four kinds, neither | principal | low | both, each mask holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Counts [3 unchanged | changed but not above 1e-5 | above, 4 kinds, BINS] for a share r."""

    share: float
    table: np.ndarray

    def held(self, mask: str) -> np.ndarray:
        """Coordinates inside a mask, [3, BINS]."""
        return self.table[:, list(MASKS[mask])].sum(axis=1)


def placements(sides: Sides, directions: Directions | None) -> list[Placement]:
    """One table for each share r of RANKS.

    Principal: the ceil(r n) largest abs(P), P the rank floor(r min dim) reconstruction of W0; low
    magnitude: the ceil(r n) smallest abs(W0). Among equals the first in row-major order are taken.
    Without directions no coordinate is principal.
    Masks are eight bits for each coordinate, so memory is a byte a weight.
    """
    # mapped, so that it goes back to the system, and malloc does not learn to keep as much
    flags = np.frombuffer(mmap(-1, sides.numel, flags=MAP_PRIVATE | MAP_ANONYMOUS), np.uint8)
    counts = [math.ceil(share * sides.numel) for share in RANKS]
    low = [Largest(count) for count in counts]
    principal = [Largest(count) for count in counts if directions is not None]
    rebuild = None if directions is None else Rebuilt(sides, directions)
    for part, cut in sides.rows():
        bins = counted(small_first(cut.base.reshape(-1).numpy()))
        for select in low:
            select.add(bins)
        for select, keys in zip(principal, _keys(rebuild, part, cut), strict=True):
            select.add(counted(keys))
    for part, cut in sides.rows():
        start, stop = part.start * sides.shape[1], part.stop * sides.shape[1]
        smallest = small_first(cut.base.reshape(-1).numpy())
        for i, keys in enumerate(_keys(rebuild, part, cut)):
            flags[start:stop] |= principal[i].certain(keys, start).astype(np.uint8) << i
        for i, select in enumerate(low):
            flags[start:stop] |= select.certain(smallest, start).astype(np.uint8) << (i + 4)
    for shift, selects in ((0, principal), (4, low)):
        for i, select in enumerate(selects):
            flags[select.rest()] |= np.uint8(1 << (i + shift))
    return _tables(sides, flags)


def _tables(sides: Sides, flags: np.ndarray) -> list[Placement]:
    kinds, shares = 3 * BINS, len(RANKS)
    cells = np.zeros(256 * kinds, np.int64)
    for part, cut in sides.flat():
        keys = large_first(cut.update.numpy())
        cell = flags[part].astype(np.int32) * np.int32(kinds) + binades(cut.base)
        cell += (keys > 0) * np.int32(BINS)
        cell += (keys > VISIBLE_KEY) * np.int32(BINS)
        cells += np.bincount(cell, minlength=len(cells))
    by_flags = cells.reshape(256, 3, BINS)
    told = []
    for i, share in enumerate(RANKS):
        kind = ((np.arange(256) >> i) & 1) + 2 * ((np.arange(256) >> (i + shares)) & 1)
        table = np.stack([by_flags[kind == k].sum(axis=0) for k in range(4)], axis=1)
        told.append(Placement(share=share, table=table))
    return told


def _keys(rebuild: "Rebuilt | None", part: slice, cut: UpdateChunk) -> list[np.ndarray]:
    return [] if rebuild is None else rebuild.keys(part, cut.base)


class Rebuilt:
    """abs(P) of rows of W0 for every rank, from its leading directions; float32."""

    def __init__(self, sides: Sides, directions: Directions) -> None:
        rows, columns = sides.shape
        self._ranks = [rank_of(share, min(rows, columns)) for share in RANKS]
        self._short = directions.short.float()
        self._is_tall = rows >= columns
        self._onto = self._short.T
        if not self._is_tall:  # P = U_k (U_k^T W0)
            self._onto = torch.zeros(self._short.shape[1], columns)
            for part, cut in sides.rows():
                self._onto.addmm_(self._short[part].T, cut.base)

    def keys(self, part: slice, base: torch.Tensor) -> list[np.ndarray]:
        """Keys of magnitude of these rows, flat, for each share of RANKS."""
        along = base @ self._short if self._is_tall else self._short[part]
        rebuilt, found, done = torch.zeros_like(base), [], 0
        for rank in self._ranks:
            rebuilt.addmm_(along[:, done:rank], self._onto[done:rank])
            found.append(large_first(rebuilt.reshape(-1).numpy()))
            done = rank
        return found
