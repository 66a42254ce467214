"""The receiving end of the sparse weight sync, without a transport: messages in, states out."""

from collections.abc import Callable, Mapping, Sequence

import torch

from opd.sync.message import Header, Kind, Message, read_message
from opd.sync.replica import DTYPES, Change, Replica
from opd.types import ReceiverState

Load = Callable[[Mapping[str, torch.Tensor], Sequence[Change], int], None]
"""Brings an engine to (all tensors, what changed in them, version)."""


class WeightReceiver:
    """Keeps the weights that were sent and loads them into an engine: all of a message, or none.

    ``load`` is called after the replica has changed and before the state says so. When it raises, the
    replica is forgotten, so that the next state asks for a snapshot, and the error propagates.
    ``shapes`` are those of the engine's weights by name: a snapshot of others is refused, and what is held
    stays. None: any are taken.
    """

    def __init__(self, load: Load, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self._load, self._shapes = load, shapes
        self._replica = Replica()
        self._run: str | None = None
        self._version: int | None = None

    def state(self, refused: str | None = None) -> ReceiverState:
        """The weights held here, and why a message was refused."""
        return ReceiverState(
            run=self._run,
            version=self._version,
            mask=self._replica.fingerprint if self._version is not None else None,
            refused=refused,
        )

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The weights; read only."""
        return self._replica.tensors

    def take(self, data: bytes) -> ReceiverState:
        """Apply a message or refuse it; one that was applied already changes nothing."""
        try:
            message = read_message(data)
            header = message.header
            if header.kind == Kind.mask:
                self._take_mask(message)
                return self.state()
            if (header.run, header.version) == (self._run, self._version):
                return self.state()
            self._require_successor(header)
            self._require_known(header)
            changes = self._replica.changes(message)
        except ValueError as error:
            return self.state(str(error))
        self._version = None
        if header.kind == Kind.snapshot:
            assert header.dtype is not None
            self._replica.become(header.table, DTYPES[header.dtype])
            if header.run != self._run:  # another sender may mean another mask by this name
                self._replica.forget_mask()
        self._replica.apply(changes)
        self._load(self._replica.tensors, changes, header.version)
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
            if header.mask is not None and header.mask != self._replica.fingerprint:
                raise ValueError(f"the patch refers to mask {header.mask}, which is not known here")
        elif same and self._version is not None and header.version < self._version:
            raise ValueError(f"version {header.version} is older than {self._version}, held here")

    def _require_known(self, header: Header) -> None:
        if self._shapes is None:
            return
        for entry in header.table:
            shape = self._shapes.get(entry.name)
            if shape != entry.shape:
                held = "no such weight" if shape is None else f"one of shape {list(shape)}"
                raise ValueError(
                    f"the snapshot holds {entry.name[:80]!r} {list(entry.shape)}, the engine has {held}"
                )

    def _take_mask(self, message: Message) -> None:
        header = message.header
        if header.run != self._run or self._version is None:
            raise ValueError(f"a mask of run {header.run} before its first snapshot")
        self._replica.kept = self._replica.decode_mask(message)
        self._replica.fingerprint = header.mask
