"""The highest scores of a model, exactly as many as requested, without holding the scores in memory.

Radix selection: coordinates are ordered by the pair (score, tie-break), where the tie-break is a
pseudo-random number of 32 bits that depends only on a salt, the parameter's name and the coordinate.
Each pass over the weights counts one field of 16 bits of that pair among the coordinates that agree
with the threshold so far; four passes fix the threshold, a last one selects. Ties are therefore broken
at random, whatever the order of the weights and the files they are stored in.
"""

import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from opd.checkpoint.chunks import (
    THREADS,
    Chunk,
    ChunkReader,
    Progress,
    chunks,
    in_order,
    quiet,
)
from opd.mask.file import index_dtype

ABOVE_ALL = 1 << 32
"""A threshold above every score and every tie-break: nothing is selected."""
UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKQuery:
    """Parameters of whose coordinates the best ``quotas[class]`` of each class are selected.

    ``scores`` reads float32 scores, the higher the better; None makes all equal, so that tie-breaks
    alone decide. ``classes`` reads the class of each coordinate; None is one class.
    """

    names: tuple[str, ...]
    quotas: tuple[int, ...]
    scores: ChunkReader | None = None
    classes: ChunkReader | None = None

    def __post_init__(self) -> None:
        assert self.scores is None or self.classes is None, "classes are sampled, not ranked"
        assert self.classes is not None or len(self.quotas) == 1, "one class, one quota"


@dataclass(slots=True, kw_only=True)
class Threshold:
    """The threshold of each class: selected are the pairs above (score, tiebreak), and the first
    ``remaining`` of those equal to it.

    ``tied`` coordinates have the threshold's score and only ``tied_kept`` of them are selected; both
    are 0 when no tie had to be broken.
    """

    score: np.ndarray
    tiebreak: np.ndarray
    remaining: np.ndarray
    tied: int = 0
    tied_kept: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """``width`` bits of the score or the tie-break, above the lowest ``shift``."""

    of_score: bool
    shift: int
    width: int


SCORE_FIELDS = [Field(of_score=True, shift=shift, width=16) for shift in (16, 0)]
TIEBREAK_FIELDS = [Field(of_score=False, shift=shift, width=16) for shift in (16, 0)]
CLASS_FIELDS = [Field(of_score=False, shift=shift, width=8) for shift in (24, 16, 8, 0)]
"""Narrower: there is a histogram for each class."""


def sortable(scores: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order; 0.0 and -0.0 are equal. Readers refuse NaN."""
    bits = (scores + np.float32(0)).view(np.uint32)
    return bits ^ np.where(bits >> np.uint32(31), np.uint32(0xFFFFFFFF), np.uint32(0x80000000))


def tiebreak(salt: str, name: str, coordinates: np.ndarray) -> np.ndarray:
    """A pseudo-random number below 2^32 for each coordinate, as uint64 (splitmix64)."""
    start = hashlib.blake2b(f"{salt} {name}".encode(), digest_size=8).digest()
    z = coordinates.astype(np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(int.from_bytes(start, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    z >>= np.uint64(32)
    return z


def fixed_threshold(score: float) -> Threshold:
    """The threshold that selects every score above a number."""
    key = sortable(np.array([score], np.float32)).astype(np.uint64)
    return Threshold(
        score=key, tiebreak=np.array([ABOVE_ALL], np.uint64), remaining=np.zeros(1, np.int64)
    )


class Selection:
    """Selections among the parameters of a model, on two threads; equal salts select the same.

    ``passes`` is the expected number of passes over the weights, for ``progress``.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        salt: str,
        *,
        passes: int = 5,
        progress: Progress = quiet,
    ) -> None:
        self._sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
        self._dtype = torch.empty(0, dtype=index_dtype(shapes)).numpy().dtype
        self._salt = salt
        self._progress = progress
        # one pool: torch starts threads of its own for each new thread that calls it
        self._pool = ThreadPoolExecutor(THREADS)
        self._done, self._total = 0, passes * sum(self._sizes.values())

    def find_threshold(self, query: TopKQuery) -> Threshold:
        """The threshold that selects exactly the query's quotas."""
        quotas = np.array(query.quotas, np.int64)
        start = np.where(quotas > 0, 0, ABOVE_ALL).astype(np.uint64)
        threshold = Threshold(score=start, tiebreak=start.copy(), remaining=quotas)
        undecided = quotas > 0
        fields = [] if query.scores is None else [*SCORE_FIELDS]
        fields += TIEBREAK_FIELDS if query.classes is None else CLASS_FIELDS
        for number, field in enumerate(fields):
            if not undecided.any():
                break
            histogram = self._histogram(query, threshold, field)
            if number == 0:
                assert (histogram.sum(axis=1) >= quotas).all(), "a quota exceeds its class"
            for label in np.flatnonzero(undecided).tolist():
                equal = _narrow(threshold, label, histogram[label], field)
                undecided[label] = equal > threshold.remaining[label]
                if not undecided[label]:
                    threshold.remaining[label] = UNLIMITED
                elif field == SCORE_FIELDS[-1]:
                    threshold.tied = equal
                    threshold.tied_kept = int(threshold.remaining[label])
        return threshold

    def select(self, query: TopKQuery, threshold: Threshold) -> Iterator[tuple[str, torch.Tensor]]:
        """The selected indices of each parameter of the query, sorted."""
        remaining = threshold.remaining.copy()
        for name in query.names:
            # pages of an empty array that stay untouched take no memory
            selected, length = np.empty(self._sizes[name], self._dtype), 0
            parts = chunks(self._sizes, [name])
            work = in_order(self._pool, lambda chunk: self._compare(query, threshold, chunk), parts)
            for chunk, (above, equal, labels) in zip(parts, work, strict=True):
                if len(equal):
                    above = np.sort(np.concatenate([above, _take(equal, labels, remaining)]))
                selected[length : length + len(above)] = above + chunk.start
                length += len(above)
                self._report(chunk)
            yield name, torch.from_numpy(selected[:length])

    def count_above(self, names: tuple[str, ...], scores: ChunkReader, score: float) -> int:
        """How many scores are above a number."""
        key = sortable(np.array([score], np.float32))[0]

        def count(chunk: Chunk) -> int:
            return int(np.count_nonzero(sortable(scores(chunk)) > key))

        return sum(in_order(self._pool, count, chunks(self._sizes, names)))

    def _histogram(self, query: TopKQuery, threshold: Threshold, field: Field) -> np.ndarray:
        """How often each digit of a field occurs on the threshold so far, [class, 2^width]."""
        shape = (len(query.quotas), 1 << field.width)
        count = self._count_scores if field.of_score else self._count_tiebreaks
        histogram = np.zeros(shape, np.int64)
        parts = chunks(self._sizes, query.names)
        work = in_order(self._pool, lambda chunk: count(query, threshold, field, chunk), parts)
        for chunk, counts in zip(parts, work, strict=True):
            histogram += counts.reshape(shape)
            self._report(chunk)
        return histogram

    def _count_scores(
        self, query: TopKQuery, threshold: Threshold, field: Field, chunk: Chunk
    ) -> np.ndarray:
        assert query.scores is not None
        keys = sortable(query.scores(chunk))
        top = field.shift + field.width
        if top < 32:
            keys = keys[keys >> np.uint32(top) == np.uint32(int(threshold.score[0]) >> top)]
        digits = keys >> np.uint32(field.shift) & np.uint32((1 << field.width) - 1)
        return np.bincount(digits, minlength=1 << field.width)

    def _count_tiebreaks(
        self, query: TopKQuery, threshold: Threshold, field: Field, chunk: Chunk
    ) -> np.ndarray:
        indices, labels = self._tied(query, threshold, chunk)
        keys = tiebreak(self._salt, chunk.name, indices + chunk.start)
        top = np.uint64(field.shift + field.width)
        if top < 32:
            agree = keys >> top == threshold.tiebreak[labels] >> top
            keys, labels = keys[agree], labels[agree] if query.classes else labels
        digits = (keys >> np.uint64(field.shift)).astype(np.int64) & ((1 << field.width) - 1)
        if query.classes is not None:
            digits += labels.astype(np.int64) << field.width
        return np.bincount(digits, minlength=len(query.quotas) << field.width)

    def _tied(
        self, query: TopKQuery, threshold: Threshold, chunk: Chunk
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices in a chunk at which the tie-break decides, and their classes (one is broadcast)."""
        one = np.zeros(1, np.uint8)
        if query.scores is not None:
            return _equal_to(sortable(query.scores(chunk)), int(threshold.score[0])), one
        labels = one if query.classes is None else query.classes(chunk)
        return np.arange(chunk.stop - chunk.start), labels

    def _compare(
        self, query: TopKQuery, threshold: Threshold, chunk: Chunk
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted indices in a chunk above the threshold; indices equal to it; classes of the latter."""
        above = np.zeros(chunk.stop - chunk.start, bool)
        if query.scores is None:
            tied, labels = self._tied(query, threshold, chunk)
        else:
            keys, score = sortable(query.scores(chunk)), int(threshold.score[0])
            if score < ABOVE_ALL:
                above = keys > np.uint32(score)
            tied, labels = _equal_to(keys, score), np.zeros(1, np.uint8)
        keys = tiebreak(self._salt, chunk.name, tied + chunk.start)
        limits = threshold.tiebreak[labels]
        above[tied[keys > limits]] = True
        equal = np.flatnonzero(keys == limits)
        return np.flatnonzero(above), tied[equal], np.broadcast_to(labels, tied.shape)[equal]

    def _report(self, chunk: Chunk) -> None:
        self._done += chunk.stop - chunk.start
        self._progress("selecting weights", self._done / self._total)


def _equal_to(keys: np.ndarray, score: int) -> np.ndarray:
    return np.flatnonzero(keys == np.uint32(score)) if score < ABOVE_ALL else np.zeros(0, np.int64)


def _narrow(threshold: Threshold, label: int, counts: np.ndarray, field: Field) -> int:
    """Fix one more field of a class's threshold and reduce ``remaining`` by what lies above it.

    Returns how many coordinates agree with the threshold so far.
    """
    from_top = np.cumsum(counts[::-1])
    step = int(np.searchsorted(from_top, threshold.remaining[label]))
    digit = len(counts) - 1 - step
    threshold.remaining[label] -= from_top[step] - counts[digit]
    key = threshold.score if field.of_score else threshold.tiebreak
    key[label] |= np.uint64(digit << field.shift)
    return int(counts[digit])


def _take(equal: np.ndarray, labels: np.ndarray, remaining: np.ndarray) -> np.ndarray:
    """The first ``remaining[class]`` of equal pairs; ``remaining`` is reduced in place."""
    taken = []
    for index, label in zip(equal, labels, strict=True):
        if remaining[label] > 0:
            remaining[label] -= 1
            taken.append(index)
    return np.array(taken, equal.dtype)
