"""The k largest of many numbers that come a chunk at a time, exactly."""

import numpy as np

_TOP = np.uint32(0x7FFFFFFF)


def large_first(values: np.ndarray) -> np.ndarray:
    """Keys that order by magnitude, uint32 of float32."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32) & _TOP


def small_first(values: np.ndarray) -> np.ndarray:
    """Keys that are largest for the smallest magnitudes."""
    return _TOP - large_first(values)


class Largest:
    """Which coordinates hold the ``count`` largest keys; among equals the first ones.

    All chunks are counted first; then, in the same order, ``certain`` marks what is surely in and
    remembers what lies in the boundary's bin, a 2^-7 step of magnitude; ``rest`` decides there.
    What is remembered is laid down in one chunk_values: many small ones between the chunks' temporaries
    would keep the memory of each chunk from being used again.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._bins = np.zeros(1 << 16, np.int64)
        self._edge, self._missing, self._seen = -1, 0, 0
        self._where = np.empty(0, np.int64)
        self._low = np.empty(0, np.uint16)

    def add(self, bins: np.ndarray) -> None:
        """Count a chunk: how many of its keys share their upper 16 bits, [65536]."""
        self._bins += bins

    def certain(self, keys: np.ndarray, start: int) -> np.ndarray:
        """The coordinates of a chunk, flat from ``start``, that are in whatever the boundary is."""
        if self._edge < 0:
            self._edge, self._missing = _reached(self._bins, self.count)
            wide = np.uint32 if self._bins.sum() < 1 << 32 else np.int64
            self._where = np.empty(self._bins[self._edge], wide)
            self._low = np.empty(self._bins[self._edge], np.uint16)
        upper = keys >> np.uint32(16)
        near = np.flatnonzero(upper == self._edge)
        held = slice(self._seen, self._seen + len(near))
        self._where[held] = near + start
        self._low[held] = keys[near] & np.uint32(0xFFFF)
        self._seen = held.stop
        return upper > self._edge

    def rest(self) -> np.ndarray:
        """Flat coordinates at the boundary that are in too."""
        return self._where[self._chosen()]

    def boundary(self) -> np.ndarray:
        """Their keys."""
        return np.uint32(self._edge << 16) | self._low[self._chosen()].astype(np.uint32)

    def _chosen(self) -> np.ndarray:
        edge, missing = _reached(np.bincount(self._low, minlength=1 << 16), self._missing)
        ties = np.flatnonzero(self._low == edge)[:missing]
        return np.concatenate([np.flatnonzero(self._low > edge), ties])


def _reached(bins: np.ndarray, count: int) -> tuple[int, int]:
    """The bin in which ``count`` is reached from above, and how many of it are needed."""
    above = np.cumsum(bins[::-1])
    place = int(np.searchsorted(above, count))
    return len(bins) - 1 - place, count - (int(above[place - 1]) if place else 0)


def counted(keys: np.ndarray) -> np.ndarray:
    """How many keys share their upper 16 bits, [65536]."""
    return np.bincount(keys >> np.uint32(16), minlength=1 << 16)
