"""The highest scores of a model, exactly as many as asked, without holding the scores.

Radix selection: coordinates are ordered by the pair (score, tiebreak), where the tiebreak is a
pseudo-random number of 32 bits that depends on a salt, the parameter's name and the coordinate
alone. Each pass over the weights counts one field of 16 bits of that pair among the coordinates
that agree with the boundary so far; four passes know the boundary, a last one writes. Equal scores
are therefore cut at random, whatever the order or the files the weights lie in.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from opd.checkpoint.chunks import THREADS, Chunk, Progress, chunks, in_order, quiet
from opd.mask.file import index_dtype

Read = Callable[[Chunk], np.ndarray]
BEYOND = 1 << 32
"""Above every score and every tiebreak: nothing is kept."""
ALL = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class TopKQuery:
    """Parameters whose coordinates compete for ``quotas[class]`` places in each class.

    ``scores`` reads float32 scores, the higher the better; None makes all equal, and tiebreak alone
    decide. ``classes`` reads the class of each coordinate; None is one class.
    """

    names: tuple[str, ...]
    quotas: tuple[int, ...]
    scores: Read | None = None
    classes: Read | None = None

    def __post_init__(self) -> None:
        assert self.scores is None or self.classes is None, "classes are drawn from, not ranked"
        assert self.classes is not None or len(self.quotas) == 1, "one class, one quota"


@dataclass(slots=True, kw_only=True)
class Threshold:
    """Where each class is cut: kept are the pairs above (score, tiebreak) and ``places`` equal to it.

    ``tied`` coordinates have the score of the boundary and only ``tied_kept`` of them are kept;
    both are 0 when no equal scores had to be parted.
    """

    score: np.ndarray
    tiebreak: np.ndarray
    places: np.ndarray
    tied: int = 0
    tied_kept: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """``width`` bits of the score or the tiebreak, above the lowest ``shift``."""

    of_score: bool
    shift: int
    width: int


SCORE_FIELDS = [Field(of_score=True, shift=shift, width=16) for shift in (16, 0)]
TICKET_FIELDS = [Field(of_score=False, shift=shift, width=16) for shift in (16, 0)]
CLASS_FIELDS = [Field(of_score=False, shift=shift, width=8) for shift in (24, 16, 8, 0)]
"""Narrower: there is a histogram for each class."""


def sortable(scores: np.ndarray) -> np.ndarray:
    """float32 -> uint32 in the same order; 0.0 and -0.0 are equal, NaN is the reader's to refuse."""
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


def cut_at(threshold: float) -> Threshold:
    """The cut that keeps every score above a threshold."""
    key = sortable(np.array([threshold], np.float32)).astype(np.uint64)
    return Threshold(
        score=key, tiebreak=np.array([BEYOND], np.uint64), places=np.zeros(1, np.int64)
    )


class Selection:
    """Choices among the parameters of a model, on two threads; one salt chooses the same again.

    ``passes`` is how often the weights are expected to be looked at, for ``progress``.
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
        self._done, self._most = 0, passes * sum(self._sizes.values())

    def cut(self, query: TopKQuery) -> Threshold:
        """The boundary that keeps exactly the query's quotas."""
        quotas = np.array(query.quotas, np.int64)
        start = np.where(quotas > 0, 0, BEYOND).astype(np.uint64)
        cut = Threshold(score=start, tiebreak=start.copy(), places=quotas)
        undecided = quotas > 0
        fields = [] if query.scores is None else [*SCORE_FIELDS]
        fields += TICKET_FIELDS if query.classes is None else CLASS_FIELDS
        for number, field in enumerate(fields):
            if not undecided.any():
                break
            table = self._histogram(query, cut, field)
            if number == 0:
                assert (table.sum(axis=1) >= quotas).all(), "a quota exceeds its class"
            for kind in np.flatnonzero(undecided).tolist():
                equal = _narrow(cut, kind, table[kind], field)
                undecided[kind] = equal > cut.places[kind]
                if not undecided[kind]:
                    cut.places[kind] = ALL
                elif field == SCORE_FIELDS[-1]:
                    cut.tied, cut.tied_kept = equal, int(cut.places[kind])
        return cut

    def kept(self, query: TopKQuery, cut: Threshold) -> Iterator[tuple[str, torch.Tensor]]:
        """The kept coordinates of each parameter of the query, sorted."""
        places = cut.places.copy()
        for name in query.names:
            # pages of an empty array that stay untouched take no memory
            found, length = np.empty(self._sizes[name], self._dtype), 0
            mine = chunks(self._sizes, [name])
            above = in_order(self._pool, lambda chunk: self._above(query, cut, chunk), mine)
            for chunk, (part, equal, classes) in zip(mine, above, strict=True):
                if len(equal):
                    part = np.sort(np.concatenate([part, _seated(equal, classes, places)]))
                found[length : length + len(part)] = part + chunk.start
                length += len(part)
                self._tell(chunk)
            yield name, torch.from_numpy(found[:length])

    def count_above(self, names: tuple[str, ...], scores: Read, threshold: float) -> int:
        """How many scores are above a threshold."""
        key = sortable(np.array([threshold], np.float32))[0]

        def count(chunk: Chunk) -> int:
            return int(np.count_nonzero(sortable(scores(chunk)) > key))

        return sum(in_order(self._pool, count, chunks(self._sizes, names)))

    def _histogram(self, query: TopKQuery, cut: Threshold, field: Field) -> np.ndarray:
        """How often each digit of a field occurs on the boundary so far, [class, 2^width]."""
        shape = (len(query.quotas), 1 << field.width)
        count = self._count_scores if field.of_score else self._count_tickets
        table = np.zeros(shape, np.int64)
        mine = chunks(self._sizes, query.names)
        work = in_order(self._pool, lambda chunk: count(query, cut, field, chunk), mine)
        for chunk, part in zip(mine, work, strict=True):
            table += part.reshape(shape)
            self._tell(chunk)
        return table

    def _count_scores(
        self, query: TopKQuery, cut: Threshold, field: Field, chunk: Chunk
    ) -> np.ndarray:
        assert query.scores is not None
        keys = sortable(query.scores(chunk))
        top = field.shift + field.width
        if top < 32:
            keys = keys[keys >> np.uint32(top) == np.uint32(int(cut.score[0]) >> top)]
        digits = keys >> np.uint32(field.shift) & np.uint32((1 << field.width) - 1)
        return np.bincount(digits, minlength=1 << field.width)

    def _count_tickets(
        self, query: TopKQuery, cut: Threshold, field: Field, chunk: Chunk
    ) -> np.ndarray:
        places, classes = self._on_boundary(query, cut, chunk)
        drawn = tiebreak(self._salt, chunk.name, places + chunk.start)
        top = np.uint64(field.shift + field.width)
        if top < 32:
            here = drawn >> top == cut.tiebreak[classes] >> top
            drawn, classes = drawn[here], classes[here] if query.classes else classes
        digits = (drawn >> np.uint64(field.shift)).astype(np.int64) & ((1 << field.width) - 1)
        if query.classes is not None:
            digits += classes.astype(np.int64) << field.width
        return np.bincount(digits, minlength=len(query.quotas) << field.width)

    def _on_boundary(
        self, query: TopKQuery, cut: Threshold, chunk: Chunk
    ) -> tuple[np.ndarray, np.ndarray]:
        """Places in a chunk where the tiebreak decides, and their classes (broadcast when only one)."""
        one = np.zeros(1, np.uint8)
        if query.scores is not None:
            return _equal_to(sortable(query.scores(chunk)), int(cut.score[0])), one
        classes = one if query.classes is None else query.classes(chunk)
        return np.arange(chunk.stop - chunk.start), classes

    def _above(
        self, query: TopKQuery, cut: Threshold, chunk: Chunk
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sorted places in a chunk above the cut; places equal to it; the classes of the latter."""
        one = np.zeros(1, np.uint8)
        keep = np.zeros(chunk.stop - chunk.start, bool)
        if query.scores is None:
            on, classes = self._on_boundary(query, cut, chunk)
        else:
            keys, score = sortable(query.scores(chunk)), int(cut.score[0])
            if score < BEYOND:
                keep = keys > np.uint32(score)
            on, classes = _equal_to(keys, score), one
        drawn = tiebreak(self._salt, chunk.name, on + chunk.start)
        line = cut.tiebreak[classes]
        keep[on[drawn > line]] = True
        at = np.flatnonzero(drawn == line)
        kinds = np.broadcast_to(classes, on.shape)[at]
        return np.flatnonzero(keep), on[at], kinds

    def _tell(self, chunk: Chunk) -> None:
        self._done += chunk.stop - chunk.start
        self._progress("choosing weights", self._done / self._most)


def _equal_to(keys: np.ndarray, score: int) -> np.ndarray:
    return np.flatnonzero(keys == np.uint32(score)) if score < BEYOND else np.zeros(0, np.int64)


def _narrow(cut: Threshold, kind: int, counts: np.ndarray, field: Field) -> int:
    """Fix one more field of a class's cut; what is left of its places; how many lie in the last bin."""
    from_top = np.cumsum(counts[::-1])
    step = int(np.searchsorted(from_top, cut.places[kind]))
    digit = len(counts) - 1 - step
    cut.places[kind] -= from_top[step] - counts[digit]
    key = cut.score if field.of_score else cut.tiebreak
    key[kind] |= np.uint64(digit << field.shift)
    return int(counts[digit])


def _seated(equal: np.ndarray, classes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Those of equal pairs, in their order, for whom their class has a place left."""
    seated = []
    for at, kind in zip(equal, classes, strict=True):
        if places[kind] > 0:
            places[kind] -= 1
            seated.append(at)
    return np.array(seated, equal.dtype)
