"""How much of a completion repeats what it has written before."""

import numpy as np

from opd.types import IntArray

GRAM = 4
"""Tokens of a sequence that counts as repeated."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""An odd constant, so that 64 bits of a sequence's hash collide by chance only."""


def repeated_share(token_ids: IntArray) -> float:
    """The share of the ``GRAM``-token sequences that occurred earlier in the completion; 0 to 1."""
    count = len(token_ids) - GRAM + 1
    if count < 1:
        return 0.0
    ids = token_ids.astype(np.uint64)
    hashes = np.zeros(count, np.uint64)
    for place in range(GRAM):
        hashes = (hashes ^ (ids[place : place + count] + np.uint64(1))) * FACTOR
    return 1.0 - len(np.unique(hashes)) / count
