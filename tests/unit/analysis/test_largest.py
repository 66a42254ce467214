"""The largest of many numbers are found exactly, a chunk at a time."""

import numpy as np

from opd.analysis.largest import Largest, count_keys, magnitude_keys


def test_the_largest_are_exact_among_ties_and_across_chunks() -> None:
    values = np.random.default_rng(0).integers(0, 40, 5000).astype(np.float32) / 7
    for count in (1, 50, 777, 5000):
        largest = Largest(count)
        for start in range(0, 5000, 600):
            largest.add(count_keys(magnitude_keys(values[start : start + 600])))
        chosen = np.zeros(5000, bool)
        for start in range(0, 5000, 600):
            keys = magnitude_keys(values[start : start + 600])
            chosen[start : start + 600] = largest.select_above(keys, start)
        chosen[largest.select_tied()] = True
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-values, kind="stable")[:count])
