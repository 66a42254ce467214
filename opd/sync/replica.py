"""The weights as sender and receiver both hold them, and what a message changes in them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd.sync.encoding import (
    Bits,
    IndexEncoding,
    Indices64,
    ValueEncoding,
    decode_indices,
    decode_values,
)
from opd.sync.message import Kind, Message, Record, TensorEntry

INTEGERS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}
"""The integer type that shows the bits of each number format."""
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in INTEGERS}
SMALL_INDEX = 2**31

Kept = dict[str, torch.Tensor | None]
"""Flat coordinates that a mask keeps, [K] int32 or int64; None: all of the tensor's."""


@dataclass(frozen=True, slots=True)
class Change:
    """New bits at ``indices_n`` of a flat tensor, or, where that is None, of all of it."""

    name: str
    indices_n: Indices64 | None
    bits_n: Bits

    def values(self, dtype: torch.dtype) -> torch.Tensor:
        """The numbers themselves, [n], a copy."""
        return torch.from_numpy(self.bits_n.copy()).view(dtype)


class Replica:
    """Full tensors on the CPU, all in one number format, under their Hugging Face names."""

    def __init__(self) -> None:
        self.dtype = torch.float32
        self.table: tuple[TensorEntry, ...] = ()
        self.tensors: dict[str, torch.Tensor] = {}
        self.fingerprint: str | None = None
        self.kept: Kept = {}

    @property
    def numel(self) -> int:
        """Coordinates of all tensors together."""
        return sum(t.numel() for t in self.tensors.values())

    def bits(self, name: str) -> Bits:
        """The flat bits of a tensor; writing them writes the tensor."""
        return flat_bits(self.tensors[name]).numpy()

    def changes(self, message: Message) -> list[Change]:
        """What a snapshot or a patch changes, decoded and checked against this replica, in table order.

        The replica stays as it is. ``ValueError`` when the message does not fit.
        """
        header = message.header
        if header.kind == Kind.snapshot:
            if header.dtype not in DTYPES:
                raise ValueError(f"numbers are {header.dtype}, known are {', '.join(DTYPES)}")
            if len(message.records) != len(header.table):
                raise ValueError("a snapshot must have one record for each of its tensors")
            return [
                _decode_whole(entry, record, DTYPES[header.dtype])
                for entry, record in _paired(header.table, message.records)
            ]
        return [
            self._decode_change(entry, record, masked=header.mask is not None)
            for entry, record in _paired(self.table, message.records)
        ]

    def decode_mask(self, message: Message) -> Kept:
        """The coordinates of a mask message, checked against this replica's table."""
        return {
            entry.name: _decode_kept(entry, record)
            for entry, record in _paired(self.table, message.records)
        }

    def become(self, table: Sequence[TensorEntry], dtype: torch.dtype) -> None:
        """Hold these tensors, values undefined where they are new; another table forgets the mask."""
        if tuple(table) == self.table and dtype == self.dtype:
            return
        self.table, self.dtype = tuple(table), dtype
        self.tensors = {e.name: torch.empty(e.shape, dtype=dtype) for e in table}
        self.forget_mask()

    def forget_mask(self) -> None:
        """Know of no mask."""
        self.fingerprint, self.kept = None, {}

    def apply(self, changes: Sequence[Change]) -> None:
        """Overwrite; idempotent."""
        for change in changes:
            own = self.bits(change.name)
            own[slice(None) if change.indices_n is None else change.indices_n] = change.bits_n

    def _decode_change(self, entry: TensorEntry, record: Record, *, masked: bool) -> Change:
        own = self.bits(entry.name)
        kept = self.kept.get(entry.name, _NO_INDICES) if masked else None
        size = len(own) if kept is None else len(kept)
        encoding = IndexEncoding(record.index_encoding)
        indices_n = decode_indices(encoding, memoryview(record.indices), record.count, size)
        if kept is not None:
            indices_n = kept.numpy()[indices_n]
        values = memoryview(record.values)
        bits_n = decode_values(ValueEncoding(record.value_encoding), values, own[indices_n])
        return Change(entry.name, indices_n, bits_n)


_NO_INDICES = torch.zeros(0, dtype=torch.int32)


def flat_bits(tensor: torch.Tensor) -> torch.Tensor:
    """[n] integers that share the memory of a contiguous tensor."""
    return tensor.view(-1).view(INTEGERS[tensor.dtype])


def require_kept(kept: Mapping[str, torch.Tensor], replica: Replica) -> Kept:
    """A mask as a replica holds it; ``ValueError`` for a name, type, order or range that is wrong."""
    checked: Kept = {}
    unknown = kept.keys() - replica.tensors.keys()
    if unknown:
        raise ValueError(
            f"the mask keeps coordinates of {min(unknown)}, which is no weight of the student"
        )
    for name, index in kept.items():
        size = replica.tensors[name].numel()
        if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"the mask's coordinates of {name} are {index.dtype} {list(index.shape)}: allowed "
                "are flat int32 or int64 indices"
            )
        if len(index) and not (index[0] >= 0 and index[-1] < size and (index.diff() > 0).all()):
            raise ValueError(
                f"the mask's coordinates of {name} must rise and lie within its {size} weights"
            )
        checked[name] = None if len(index) == size else _narrowed(index.cpu(), size)
    return checked


def _paired(
    table: Sequence[TensorEntry], records: Sequence[Record]
) -> Iterator[tuple[TensorEntry, Record]]:
    last = -1
    for record in records:
        if not last < record.tensor < len(table):
            raise ValueError(f"record of tensor {record.tensor} behind {last}, of {len(table)}")
        last = record.tensor
        yield table[record.tensor], record


def _decode_whole(entry: TensorEntry, record: Record, dtype: torch.dtype) -> Change:
    integer = np.dtype(str(INTEGERS[dtype]).removeprefix("torch."))
    values = memoryview(record.values)
    if len(values) != math.prod(entry.shape) * integer.itemsize:
        raise ValueError(f"{entry.name} of shape {list(entry.shape)} comes in {len(values)} bytes")
    return Change(entry.name, None, np.frombuffer(values, integer))


def _decode_kept(entry: TensorEntry, record: Record) -> torch.Tensor | None:
    size, encoding = math.prod(entry.shape), IndexEncoding(record.index_encoding)
    if encoding == IndexEncoding.whole:
        return None
    indices_n = decode_indices(encoding, memoryview(record.indices), record.count, size)
    return _narrowed(torch.from_numpy(indices_n), size)


def _narrowed(index: torch.Tensor, size: int) -> torch.Tensor:
    """int32 where every index of ``size`` fits in it."""
    return index.to(torch.int32 if size < SMALL_INDEX else torch.int64)
