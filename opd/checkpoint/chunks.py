"""Whole models a chunk at a time: what every pass over the weights shares."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from opd.checkpoint.tensors import Stored

CHUNK = 1 << 18
"""Coordinates looked at together: a few MiB of temporaries."""
THREADS = 2
AHEAD = 4
"""Pieces under way; more would only hold results that wait."""

Progress = Callable[[str, float], None]
"""Told what is being done and which share of it is done."""
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Flat coordinates [start, stop) of one parameter."""

    name: str
    start: int
    stop: int


def quiet(_doing: str, _done: float) -> None:
    """Progress that nobody watches."""


def chunks(sizes: Mapping[str, int], names: Iterable[str]) -> list[Chunk]:
    """The parameters of these names, cut up; empty ones have none."""
    return [
        Chunk(name, start, min(start + CHUNK, sizes[name]))
        for name in names
        for start in range(0, sizes[name], CHUNK)
    ]


def in_order(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``map`` over threads that never holds more than a few results."""
    under_way: deque[Future[B]] = deque()
    for item in items:
        under_way.append(pool.submit(work, item))
        if len(under_way) >= AHEAD:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()


def chunk_values(stored: Stored, chunk: Chunk) -> torch.Tensor:
    """These coordinates of a tensor, as stored."""
    return stored.read().reshape(-1)[chunk.start : chunk.stop]


def float32(values: torch.Tensor) -> np.ndarray:
    """As numpy float32; float64 is rounded."""
    return values.float().numpy()


BINS = 256
"""Bins of ``binades``: zeros, subnormal numbers (one spacing, one bin), then each exponent."""


def binades(values: torch.Tensor) -> np.ndarray:
    """floor(log2|w|) of every weight as a bin number below ``BINS``, uint8; zeros are bin 0."""
    bits = float32(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
    exponent = bits >> np.uint32(23)
    return (exponent + ((bits > 0) & (exponent < BINS - 1))).astype(np.uint8)


def counts_by_binade(stored: Stored, index: torch.Tensor) -> np.ndarray:
    """How many of some coordinates of a parameter lie in each binade of its weights, [BINS]."""
    weights, counts = stored.read().reshape(-1), np.zeros(BINS, np.int64)
    for part in index.split(CHUNK):
        counts += np.bincount(binades(weights[part]), minlength=BINS)
    return counts
