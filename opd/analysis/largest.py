"""The exact k largest of many numbers that are read a chunk at a time."""

import numpy as np

_TOP = np.uint32(0x7FFFFFFF)


def magnitude_keys(values: np.ndarray) -> np.ndarray:
    """uint32 keys of float32 numbers that sort by magnitude."""
    return np.ascontiguousarray(values, np.float32).view(np.uint32) & _TOP


def inverse_magnitude_keys(values: np.ndarray) -> np.ndarray:
    """uint32 keys that are largest for the smallest magnitudes."""
    return _TOP - magnitude_keys(values)


class Largest:
    """Selects the coordinates of the ``number`` largest keys; the first ones among equal keys.

    All chunks are counted first. Then, in the same order, ``select_above`` marks the coordinates above
    the threshold's bin (a 2^-7 step of magnitude) and remembers those inside it, among which
    ``select_tied`` decides. They are remembered in one allocation: many small ones between the chunks'
    temporaries would keep the memory of each chunk from being reused.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._bins = np.zeros(1 << 16, np.int64)
        self._threshold, self._missing, self._remembered = -1, 0, 0
        self._indices = np.empty(0, np.int64)
        self._low = np.empty(0, np.uint16)

    def add(self, bins: np.ndarray) -> None:
        """Count a chunk: how many of its keys share their upper 16 bits, [65536]."""
        self._bins += bins

    def select_above(self, keys: np.ndarray, start: int) -> np.ndarray:
        """Mark the coordinates of a chunk, flat from ``start``, above the threshold's bin; bool."""
        if self._threshold < 0:
            self._threshold, self._missing = _find_bin(self._bins, self.number)
            wide = np.uint32 if self._bins.sum() < 1 << 32 else np.int64
            self._indices = np.empty(self._bins[self._threshold], wide)
            self._low = np.empty(self._bins[self._threshold], np.uint16)
        upper = keys >> np.uint32(16)
        tied = np.flatnonzero(upper == self._threshold)
        added = slice(self._remembered, self._remembered + len(tied))
        self._indices[added] = tied + start
        self._low[added] = keys[tied] & np.uint32(0xFFFF)
        self._remembered = added.stop
        return upper > self._threshold

    def select_tied(self) -> np.ndarray:
        """Flat coordinates inside the threshold's bin that are selected too."""
        return self._indices[self._selected()]

    def tied_keys(self) -> np.ndarray:
        """The keys of ``select_tied``."""
        return np.uint32(self._threshold << 16) | self._low[self._selected()].astype(np.uint32)

    def _selected(self) -> np.ndarray:
        threshold, missing = _find_bin(np.bincount(self._low, minlength=1 << 16), self._missing)
        ties = np.flatnonzero(self._low == threshold)[:missing]
        return np.concatenate([np.flatnonzero(self._low > threshold), ties])


def _find_bin(bins: np.ndarray, number: int) -> tuple[int, int]:
    """The bin in which a count from above reaches ``number``, and how many of it are needed."""
    above = np.cumsum(bins[::-1])
    step = int(np.searchsorted(above, number))
    return len(bins) - 1 - step, number - (int(above[step - 1]) if step else 0)


def count_keys(keys: np.ndarray) -> np.ndarray:
    """How many keys share their upper 16 bits, [65536]."""
    return np.bincount(keys >> np.uint32(16), minlength=1 << 16)
