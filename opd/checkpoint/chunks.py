"""Reading the weights of whole models a chunk at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from opd.checkpoint.stored import Stored

CHUNK = 1 << 18
"""Coordinates processed together: a few MiB of temporaries."""
THREADS = 2
AHEAD = 4
"""Chunks in flight; more would only queue results in memory."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done."""
ChunkReader = Callable[["Chunk"], np.ndarray]
"""Returns one value for each coordinate of a chunk."""
A = TypeVar("A")
B = TypeVar("B")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Flat coordinates [start, stop) of one parameter."""

    name: str
    start: int
    stop: int


def quiet(_doing: str, _done: float) -> None:
    """A progress callback that does nothing."""


def chunks(sizes: Mapping[str, int], names: Iterable[str]) -> list[Chunk]:
    """The chunks of the parameters of these names, in order; an empty parameter has none."""
    return [
        Chunk(name, start, min(start + CHUNK, sizes[name]))
        for name in names
        for start in range(0, sizes[name], CHUNK)
    ]


def in_order(pool: ThreadPoolExecutor, work: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """``map`` over threads, in order, that never holds more than a few results."""
    in_flight: deque[Future[B]] = deque()
    for item in items:
        in_flight.append(pool.submit(work, item))
        if len(in_flight) >= AHEAD:
            yield in_flight.popleft().result()
    while in_flight:
        yield in_flight.popleft().result()


def chunk_values(stored: Stored, chunk: Chunk) -> torch.Tensor:
    """The values of a chunk of a tensor, as stored."""
    return stored.read().reshape(-1)[chunk.start : chunk.stop]


def float32(values: torch.Tensor) -> np.ndarray:
    """Values as numpy float32; float64 is rounded."""
    return values.float().numpy()


BINS = 256
"""Bins of ``binades``: zeros, subnormal numbers (one spacing, one bin), then each exponent."""


def binades(values: torch.Tensor) -> np.ndarray:
    """floor(log2|w|) of every weight as a bin number below ``BINS``, uint8; zeros are bin 0."""
    bits = float32(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
    exponent = bits >> np.uint32(23)
    return (exponent + ((bits > 0) & (exponent < BINS - 1))).astype(np.uint8)


def counts_by_binade(stored: Stored, index: torch.Tensor) -> np.ndarray:
    """How many of the coordinates ``index`` lie in each binade of a parameter's weights, [BINS]."""
    weights, counts = stored.read().reshape(-1), np.zeros(BINS, np.int64)
    for part in index.split(CHUNK):
        counts += np.bincount(binades(weights[part]), minlength=BINS)
    return counts
