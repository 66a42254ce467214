"""The sending end of the sparse weight sync, without a transport: weights in, messages out.

``prepare`` encodes a version once; ``next_for`` gives the next message for a receiver until that is
None; ``commit`` follows when every receiver has acknowledged. See docs/weight_sync.md.
"""

import secrets
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from opd.faults import RunError
from opd.interfaces import Weights
from opd.sync.encoding import IndexEncoding, ValueEncoding, encode_indices, encode_values
from opd.sync.message import Header, Kind, Record, TensorEntry, read_message, write_message
from opd.sync.replica import INTEGERS, Replica, flat_bits, require_kept
from opd.types import ReceiverState


class FrozenWeightsMoved(RunError):
    """A weight outside the mask has moved."""


@dataclass(slots=True)
class _Pending:
    """A version being sent: its message, and how many coordinates it changes."""

    version: int
    message: bytes
    is_snapshot: bool
    table: list[TensorEntry]
    changed: int


class WeightSender:
    """Holds a replica of what the receivers hold, and writes the messages that they need.

    ``dtype`` is the engine's: weights are cast before they are compared, bit by bit. Every
    ``snapshot_every``-th version goes to every receiver whole. ``kept`` names the coordinates that may
    change (flat, rising, int32 or int64; a name that is not in it is frozen) and ``fingerprint``
    names that mask; only these are compared, and each snapshot checks all the others.
    Memory: one copy of the weights in ``dtype``, one tensor, and the message being sent.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype,
        snapshot_every: int,
        kept: Mapping[str, torch.Tensor] | None = None,
        fingerprint: str | None = None,
        run: str | None = None,
    ) -> None:
        assert dtype in INTEGERS, f"no integer view of {dtype}"
        assert (kept is None) == (fingerprint is None), "a mask and its fingerprint come together"
        self.run = run or secrets.token_hex(6)
        self._dtype, self._snapshot_every = dtype, snapshot_every
        self._given_mask, self._fingerprint = kept, fingerprint
        self._replica = Replica()
        self._committed: int | None = None
        self._pushes = 0
        self.snapshots = False
        """Whether the version prepared last is a snapshot for every receiver."""
        self.changed = 1.0
        """Share of the coordinates that the version prepared last changed; 1 for the first."""
        self._pending: _Pending | None = None
        self._mask_message: bytes | None = None
        self._late_snapshot: bytes | None = None
        self._lock = threading.Lock()

    def whole(self) -> "WeightSender":
        """Another sender of the same run that sends every version whole and knows no mask."""
        return WeightSender(dtype=self._dtype, snapshot_every=1, run=self.run)

    @property
    def version(self) -> int | None:
        """The version that receivers are brought to: the one prepared last, else the one committed."""
        return self._committed if self._pending is None else self._pending.version

    def prepare(self, weights: Weights, version: int) -> None:
        """Read the stream to its end and encode what it changes. Nothing is committed.

        Raises FrozenWeightsMoved when a snapshot finds that a weight outside the mask moved.
        """
        assert self._committed is None or version > self._committed, "versions rise"
        self._pending, self._late_snapshot = None, None
        is_snapshot = self._committed is None or self._pushes % self._snapshot_every == 0
        self._pending = (self._snapshot if is_snapshot else self._patch)(weights, version)
        self._pushes += 1
        self.snapshots = is_snapshot
        if self._committed is not None:
            self.changed = self._pending.changed / max(1, self._replica.numel)

    def next_for(self, state: ReceiverState) -> bytes | None:
        """The next message for a receiver in ``state``; None when it has the version.

        Safe to call from several threads.
        """
        assert self.version is not None, "nothing has been prepared"
        if state.run == self.run and state.version == self.version:
            return None
        with self._lock:
            pending = self._pending
            if pending is not None and pending.is_snapshot:
                return pending.message
            fits = state.run == self.run and state.version == self._committed
            if pending is None or not fits or state.refused is not None:
                return self._snapshot_for_late()
            if self._fingerprint is not None and state.mask != self._fingerprint:
                return self._write_mask()
            return pending.message

    def commit(self) -> None:
        """Every receiver has acknowledged the version prepared last; from now on it is the base."""
        pending = self._pending
        assert pending is not None, "nothing has been prepared"
        message = read_message(pending.message)
        if pending.is_snapshot:
            self._replica.become(pending.table, self._dtype)
            if self._given_mask is not None and self._replica.fingerprint is None:
                self._replica.kept = require_kept(self._given_mask, self._replica)
                self._replica.fingerprint = self._fingerprint
        self._replica.apply(self._replica.changes(message))
        self._committed, self._pending, self._late_snapshot = pending.version, None, None

    def _snapshot(self, weights: Weights, version: int) -> _Pending:
        table: list[TensorEntry] = []
        changed = 0

        def records() -> Iterator[Record]:
            nonlocal changed
            for name, tensor in weights:
                new = self._cast(tensor)
                changed += self._count_changed(name, new)
                table.append(TensorEntry(name=name, shape=tuple(tensor.shape)))
                yield _whole_record(len(table) - 1, new)

        message = write_message(self._header(Kind.snapshot, version), records(), table)
        return _Pending(version, message, True, table, changed)

    def _patch(self, weights: Weights, version: int) -> _Pending:
        changed = 0
        order = {entry.name: i for i, entry in enumerate(self._replica.table)}

        def records() -> Iterator[Record]:
            nonlocal changed
            for name, tensor in weights:
                record = self._patch_record(order.pop(name), name, tensor)
                if record is not None:
                    changed += record.count
                    yield record

        message = write_message(
            self._header(Kind.patch, version),
            sorted(records(), key=lambda r: r.tensor),
            [],
        )
        assert not order, f"the learner handed over no {min(order)}"
        return _Pending(version, message, False, [], changed)

    def _patch_record(self, tensor_index: int, name: str, tensor: torch.Tensor) -> Record | None:
        """The coordinates that may change and did; None when none did."""
        masked = self._fingerprint is not None
        if masked and name not in self._replica.kept:
            return None
        old, new = flat_bits(self._replica.tensors[name]), flat_bits(self._cast(tensor))
        kept = self._replica.kept[name] if masked else None
        if kept is not None:
            old, new = old.index_select(0, kept), new.index_select(0, kept)
        differ = (old != new).nonzero().view(-1)
        if not len(differ):
            return None
        old_n, new_n, differ_n = old.numpy(), new.numpy(), differ.numpy()
        index_encoding, indices = encode_indices(differ_n, len(new_n))
        value_encoding, values = encode_values(old_n[differ_n], new_n[differ_n])
        if len(indices) + len(values) < new_n.nbytes:
            return Record(
                tensor_index, index_encoding, value_encoding, len(differ_n), indices, values
            )
        return Record(
            tensor_index, IndexEncoding.whole, ValueEncoding.plain, len(new_n), b"", new_n.tobytes()
        )

    def _count_changed(self, name: str, new: torch.Tensor) -> int:
        """How many coordinates of a whole tensor changed; raises when one of them is frozen."""
        if self._committed is None:
            return 0
        old = flat_bits(self._replica.tensors[name])
        differ = old != flat_bits(new)
        changed = int(differ.count_nonzero())
        if self._fingerprint is not None:
            kept = self._replica.kept.get(name, old[:0].to(torch.int32))
            allowed = changed if kept is None else int(differ.index_select(0, kept).sum())
            if allowed != changed:
                raise FrozenWeightsMoved(
                    f"{changed - allowed} weights of {name} that the mask freezes have moved: the "
                    "learner trains outside the mask that the engine was sent"
                )
        return changed

    def _snapshot_for_late(self) -> bytes:
        """The version being sent, or the one committed, whole: for a receiver that fell behind."""
        if self._late_snapshot is None:
            replica, version = self._replica, self.version
            assert version is not None
            changes = {}
            if self._pending is not None:
                message = read_message(self._pending.message)
                changes = {change.name: change for change in replica.changes(message)}

            def records() -> Iterator[Record]:
                for i, entry in enumerate(replica.table):
                    new = replica.tensors[entry.name]
                    if entry.name in changes:
                        change = changes[entry.name]
                        new = new.clone()
                        flat_bits(new).numpy()[change.indices_n] = change.bits_n
                    yield _whole_record(i, new)

            header = self._header(Kind.snapshot, version)
            self._late_snapshot = write_message(header, records(), list(replica.table))
        return self._late_snapshot

    def _write_mask(self) -> bytes:
        """The kept coordinates; encoded once."""
        if self._mask_message is None:
            assert self._committed is not None
            records = []
            for i, entry in enumerate(self._replica.table):
                size = self._replica.tensors[entry.name].numel()
                if entry.name in self._replica.kept:
                    kept = self._replica.kept[entry.name]
                    if kept is None:
                        encoding, indices, count = IndexEncoding.whole, b"", size
                    else:
                        encoding, indices = encode_indices(kept.numpy().astype("int64"), size)
                        count = len(kept)
                    records.append(Record(i, encoding, ValueEncoding.plain, count, indices, b""))
            header = self._header(Kind.mask, self._committed)
            self._mask_message = write_message(header, records, [])
        return self._mask_message

    def _header(self, kind: Kind, version: int) -> Header:
        patch = kind == Kind.patch
        return Header(
            kind=kind,
            run=self.run,
            version=version,
            base_version=self._committed if patch else None,
            mask=None if kind == Kind.snapshot else self._fingerprint,
            dtype=str(self._dtype).removeprefix("torch.") if kind == Kind.snapshot else None,
        )

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self._dtype).cpu().contiguous()


def _whole_record(tensor_index: int, tensor: torch.Tensor) -> Record:
    values = flat_bits(tensor).numpy().view(np.uint8).data
    return Record(
        tensor_index, IndexEncoding.whole, ValueEncoding.plain, tensor.numel(), b"", values
    )
