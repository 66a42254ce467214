"""Sequences into rows of a micro-batch, and a share of sequences into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from opd.types import ScoredRollout


class Packing(StrEnum):
    """How the sequences of a micro-batch become rows.

    off: one sequence a row, padded to the longest.
    rows: several sequences a row, rows as long as the longest sequence.
    one_row: all sequences in one row without padding, for attention kernels of variable length.
    """

    off = "off"
    rows = "rows"
    one_row = "one_row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where sequences lie in a matrix [rows, width] of token ids: sequence i begins at ``starts[i]`` of
    row ``rows[i]``."""

    rows: list[int]
    starts: list[int]
    width: int

    @property
    def height(self) -> int:
        """The number of rows."""
        return max(self.rows) + 1


def arrange(lengths: Sequence[int], packing: Packing) -> Layout:
    """The layout of sequences of these ``lengths``; with ``Packing.rows`` each takes the first row with room.

    Little is padded when the longest come first.
    """
    if packing == Packing.one_row:
        *starts, width = accumulate(lengths, initial=0)
        return Layout(rows=[0] * len(lengths), starts=starts, width=width)
    width = max(lengths)
    if packing == Packing.off:
        return Layout(rows=list(range(len(lengths))), starts=[0] * len(lengths), width=width)
    rows, starts, filled = [], [], []
    for length in lengths:
        row = next((r for r, end in enumerate(filled) if end + length <= width), len(filled))
        if row == len(filled):
            filled.append(0)
        rows.append(row)
        starts.append(filled[row])
        filled[row] += length
    return Layout(rows=rows, starts=starts, width=width)


def micro_batches(
    scored: Sequence[ScoredRollout], *, tokens: int, packing: Packing = Packing.off
) -> list[list[ScoredRollout]]:
    """Split a rank's share into groups whose ``arrange`` takes at most ``tokens`` positions, longest first.

    A group has one teacher. A sequence longer than ``tokens`` is a group of its own.
    """
    by_teacher: dict[str | None, list[ScoredRollout]] = {}
    for item in sorted(scored, key=lambda s: -len(s.rollout.sequence)):
        by_teacher.setdefault(item.rollout.prompt.teacher, []).append(item)
    groups: list[list[ScoredRollout]] = []
    for items in by_teacher.values():
        room: _MicroBatch | None = None
        for item in items:
            length = len(item.rollout.sequence)
            if room is None or not room.take(length):
                room = _MicroBatch(length, tokens, packing)
                groups.append([])
            groups[-1].append(item)
    return groups


class _MicroBatch:
    """The room of one micro-batch, begun with its longest sequence."""

    def __init__(self, longest: int, tokens: int, packing: Packing) -> None:
        self._packing = packing
        self._most = 1 if packing == Packing.one_row else max(1, tokens // longest)
        self._width = max(tokens, longest) if packing == Packing.one_row else longest
        self._filled = [longest]

    def take(self, length: int) -> bool:
        """Add a sequence no longer than the first; False when there is no room."""
        for row, end in enumerate(self._filled):
            if self._packing != Packing.off and end + length <= self._width:
                self._filled[row] += length
                return True
        if len(self._filled) < self._most:
            self._filled.append(length)
            return True
        return False


def padding(groups: Sequence[Sequence[ScoredRollout]], packing: Packing) -> int:
    """Positions of micro-batches that hold no token."""
    empty = 0
    for group in groups:
        lengths = [len(s.rollout.sequence) for s in group]
        layout = arrange(lengths, packing)
        empty += layout.height * layout.width - sum(lengths)
    return empty
