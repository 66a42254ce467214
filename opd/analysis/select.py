"""The k largest of many numbers that come a piece at a time, exactly."""

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

    All pieces are counted first; then, in the same order, ``certain`` marks what is surely in and
    remembers what lies in the boundary's bin, a 2^-7 step of magnitude; ``rest`` decides there.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._bins = np.zeros(1 << 16, np.int64)
        self._edge, self._missing = -1, 0
        self._where: list[np.ndarray] = []
        self._keys: list[np.ndarray] = []

    def add(self, bins: np.ndarray) -> None:
        """Count a piece: how many of its keys share their upper 16 bits, [65536]."""
        self._bins += bins

    def certain(self, keys: np.ndarray, start: int) -> np.ndarray:
        """The coordinates of a piece, flat from ``start``, that are in whatever the boundary is."""
        if self._edge < 0:
            above = np.cumsum(self._bins[::-1])
            place = int(np.searchsorted(above, self.count))
            self._edge = len(above) - 1 - place
            self._missing = self.count - (int(above[place - 1]) if place else 0)
        upper = keys >> np.uint32(16)
        near = np.flatnonzero(upper == self._edge)
        self._where.append(near + start)
        self._keys.append(keys[near])
        return upper > self._edge

    def rest(self) -> np.ndarray:
        """Flat coordinates at the boundary that are in too."""
        return np.concatenate(self._where)[self._chosen()]

    def boundary(self) -> np.ndarray:
        """Their keys."""
        return np.concatenate(self._keys)[self._chosen()]

    def _chosen(self) -> np.ndarray:
        keys = np.concatenate(self._keys).astype(np.int64)
        return np.argsort(-keys, kind="stable")[: self._missing]


def counted(keys: np.ndarray) -> np.ndarray:
    """How many keys share their upper 16 bits, [65536]."""
    return np.bincount(keys >> np.uint32(16), minlength=1 << 16)
