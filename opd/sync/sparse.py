"""Both ends of the sparse weight sync, without a transport: bytes out, bytes in, answers back.

The sender encodes each version once, asks ``next_for`` what a receiver needs next until that is
None, and commits when every receiver has acknowledged. See docs/weight_sync.md.
"""

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from opd.interfaces import Weights
from opd.sync.encoding import IndexEncoding, ValueEncoding, encode_places, encode_values
from opd.sync.message import Header, Kind, Message, Record, TensorEntry, read_message, write_message
from opd.sync.replica import DTYPES, INTEGERS, Change, Replica, checked_kept, flat_bits
from opd.types import ReceiverState

Load = Callable[[Mapping[str, torch.Tensor], Sequence[Change], int], None]
"""Brings an engine to (all tensors, what changed in them, version)."""


class FrozenWeightsMoved(RuntimeError):
    """A weight that the mask freezes is not what it was."""


@dataclass(slots=True)
class _Pending:
    """A version on its way: its message, and how many coordinates it changes."""

    version: int
    message: bytes
    is_snapshot: bool
    table: list[TensorEntry]
    changed: int


class WeightSender:
    """Holds what the receivers hold, and says what they need.

    ``dtype`` is the engine's: weights are cast before they are compared, bit by bit. Every
    ``snapshot_every``-th version goes to everybody whole. ``kept`` names the coordinates that may
    change (flat, rising, int32 or int64; a name that is not in it is frozen) and ``fingerprint``
    names that mask; only these are compared, and each snapshot checks all the others.
    Memory: one copy of the weights in ``dtype``, one tensor, and the message under way.
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
        self._mirror = Replica()
        self._committed: int | None = None
        self._pushes = 0
        self.snapshots = False
        """Whether the version prepared last goes to everybody whole."""
        self.changed = 1.0
        """Share of the coordinates that the version prepared last changed; 1 for the first."""
        self._pending: _Pending | None = None
        self._mask_message: bytes | None = None
        self._late_snapshot: bytes | None = None
        self._lock = threading.Lock()

    @property
    def version(self) -> int | None:
        """What receivers are brought to: the version prepared last, else the one committed."""
        return self._committed if self._pending is None else self._pending.version

    def prepare(self, weights: Weights, version: int) -> None:
        """Read the stream to its end and encode what it changes. Nothing is committed.

        Raises FrozenWeightsMoved when a snapshot finds that a weight outside the mask moved.
        """
        assert self._committed is None or version > self._committed, "versions rise"
        self._pending, self._late_snapshot = None, None
        is_snapshot = self._committed is None or self._pushes % self._snapshot_every == 0
        self._pending = (self._snapshot if is_snapshot else self._patched)(weights, version)
        self._pushes += 1
        self.snapshots = is_snapshot
        if self._committed is not None:
            self.changed = self._pending.changed / max(1, self._mirror.numel)

    def next_for(self, held: ReceiverState) -> bytes | None:
        """The next message for a receiver that answered ``held``; None when it has the version.

        Safe to call from several threads.
        """
        assert self.version is not None, "nothing has been prepared"
        if held.run == self.run and held.version == self.version:
            return None
        with self._lock:
            pending = self._pending
            if pending is not None and pending.is_snapshot:
                return pending.message
            fits = held.run == self.run and held.version == self._committed
            if pending is None or not fits or held.refused is not None:
                return self._snapshot_for_late()
            if self._fingerprint is not None and held.mask != self._fingerprint:
                return self._mask()
            return pending.message

    def commit(self) -> None:
        """Everybody has acknowledged the version that was prepared; from now on it is the base."""
        pending = self._pending
        assert pending is not None, "nothing has been prepared"
        message = read_message(pending.message)
        if pending.is_snapshot:
            self._mirror.become(pending.table, self._dtype)
            if self._given_mask is not None and self._mirror.fingerprint is None:
                self._mirror.kept = checked_kept(self._given_mask, self._mirror)
                self._mirror.fingerprint = self._fingerprint
        self._mirror.apply(self._mirror.changes(message))
        self._committed, self._pending, self._late_snapshot = pending.version, None, None

    def _snapshot(self, weights: Weights, version: int) -> _Pending:
        table: list[TensorEntry] = []
        changed = 0

        def records() -> Iterator[Record]:
            nonlocal changed
            for name, tensor in weights:
                new = self._cast(tensor)
                changed += self._compared(name, new)
                table.append(TensorEntry(name=name, shape=tuple(tensor.shape)))
                yield _whole_record(len(table) - 1, new)

        message = write_message(self._header(Kind.snapshot, version), records(), table)
        return _Pending(version, message, True, table, changed)

    def _patched(self, weights: Weights, version: int) -> _Pending:
        changed = 0
        order = {entry.name: i for i, entry in enumerate(self._mirror.table)}

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

    def _patch_record(self, place: int, name: str, tensor: torch.Tensor) -> Record | None:
        """What differs among the coordinates that may change; None when nothing does."""
        masked = self._fingerprint is not None
        if masked and name not in self._mirror.kept:
            return None
        old, new = flat_bits(self._mirror.tensors[name]), flat_bits(self._cast(tensor))
        kept = self._mirror.kept[name] if masked else None
        if kept is not None:
            old, new = old.index_select(0, kept), new.index_select(0, kept)
        differ = (old != new).nonzero().view(-1)
        if not len(differ):
            return None
        old_n, new_n, differ_n = old.numpy(), new.numpy(), differ.numpy()
        place_form, places = encode_places(differ_n, len(new_n))
        value_form, values = encode_values(old_n[differ_n], new_n[differ_n])
        if len(places) + len(values) < new_n.nbytes:
            return Record(place, place_form, value_form, len(differ_n), places, values)
        return Record(
            place, IndexEncoding.whole, ValueEncoding.plain, len(new_n), b"", new_n.tobytes()
        )

    def _compared(self, name: str, new: torch.Tensor) -> int:
        """Coordinates of a whole tensor that changed; raises when one of them is frozen."""
        if self._committed is None:
            return 0
        old = flat_bits(self._mirror.tensors[name])
        differ = old != flat_bits(new)
        changed = int(differ.count_nonzero())
        if self._fingerprint is not None:
            kept = self._mirror.kept.get(name, old[:0].to(torch.int32))
            allowed = changed if kept is None else int(differ.index_select(0, kept).sum())
            if allowed != changed:
                raise FrozenWeightsMoved(
                    f"{changed - allowed} weights of {name} that the mask freezes have moved: the "
                    "learner does not keep to the mask that the engine was told"
                )
        return changed

    def _snapshot_for_late(self) -> bytes:
        """The version under way, or the one committed, whole: for a receiver that lost the thread."""
        if self._late_snapshot is None:
            replica, version = self._mirror, self.version
            assert version is not None
            told = {}
            if self._pending is not None:
                told = {c.name: c for c in replica.changes(read_message(self._pending.message))}

            def records() -> Iterator[Record]:
                for i, entry in enumerate(replica.table):
                    new = replica.tensors[entry.name]
                    if entry.name in told:
                        change = told[entry.name]
                        new = new.clone()
                        flat_bits(new).numpy()[change.places_n] = change.bits_n
                    yield _whole_record(i, new)

            header = self._header(Kind.snapshot, version)
            self._late_snapshot = write_message(header, records(), list(replica.table))
        return self._late_snapshot

    def _mask(self) -> bytes:
        """The kept coordinates; encoded once."""
        if self._mask_message is None:
            assert self._committed is not None
            records = []
            for i, entry in enumerate(self._mirror.table):
                size = self._mirror.tensors[entry.name].numel()
                if entry.name in self._mirror.kept:
                    kept = self._mirror.kept[entry.name]
                    if kept is None:
                        form, places, count = IndexEncoding.whole, b"", size
                    else:
                        form, places = encode_places(kept.numpy().astype("int64"), size)
                        count = len(kept)
                    records.append(Record(i, form, ValueEncoding.plain, count, places, b""))
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


class WeightReceiver:
    """Keeps the weights that were sent, and brings an engine to them: all of a message, or none.

    ``load`` is called after the replica has changed and before the version is told; when it raises,
    everything is forgotten, so that the next answer asks for a snapshot, and the error goes on.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._mirror = Replica()
        self._run: str | None = None
        self._version: int | None = None

    def state(self, refused: str | None = None) -> ReceiverState:
        """What is here."""
        return ReceiverState(
            run=self._run,
            version=self._version,
            mask=self._mirror.fingerprint if self._version is not None else None,
            refused=refused,
        )

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The weights, not to be written."""
        return self._mirror.tensors

    def take(self, data: bytes) -> ReceiverState:
        """Apply a message or refuse it; one that is already here changes nothing."""
        try:
            message = read_message(data)
            header = message.header
            if header.kind == Kind.mask:
                self._take_mask(message)
                return self.state()
            if (header.run, header.version) == (self._run, self._version):
                return self.state()
            self._require_successor(header)
            changes = self._mirror.changes(message)
        except ValueError as error:
            return self.state(str(error))
        self._version = None
        if header.kind == Kind.snapshot:
            assert header.dtype is not None
            self._mirror.become(header.table, DTYPES[header.dtype])
            if header.run != self._run:  # another sender may mean another mask by this name
                self._mirror.forget_mask()
        self._mirror.apply(changes)
        self._load(self._mirror.tensors, changes, header.version)
        self._run, self._version = header.run, header.version
        return self.state()

    def _require_successor(self, header: Header) -> None:
        same = header.run == self._run and self._version is not None
        if header.kind == Kind.patch:
            if not same or header.base_version != self._version:
                raise ValueError(
                    f"the patch goes from version {header.base_version} of run {header.run}, here is "
                    f"version {self._version} of run {self._run}"
                )
            if header.mask is not None and header.mask != self._mirror.fingerprint:
                raise ValueError(f"the patch refers to mask {header.mask}, which is not known here")
        elif same and self._version is not None and header.version < self._version:
            raise ValueError(f"version {header.version} is older than {self._version}, held here")

    def _take_mask(self, message: Message) -> None:
        header = message.header
        if header.run != self._run or self._version is None:
            raise ValueError(f"a mask of run {header.run} before its first snapshot")
        self._mirror.kept = self._mirror.mask_of(message)
        self._mirror.fingerprint = header.mask


def _whole_record(place: int, tensor: torch.Tensor) -> Record:
    values = flat_bits(tensor).numpy().view(np.uint8).data
    return Record(place, IndexEncoding.whole, ValueEncoding.plain, tensor.numel(), b"", values)
