"""The bytes that carry weights from learner to engine: a header, a table of records, their payloads.

    sha256 [32]  of everything behind it
    length [8]   of the JSON header at the end, little endian
    payloads     of all records, end to end
    records      one per tensor that changes, ``RECORD`` each
    header       JSON: format, kind, run, version, base_version, mask, records, and with a snapshot
                 dtype and the table of tensors: [name, shape] each

A snapshot holds every tensor whole. A patch holds what differs from ``base_version``; its indices
count the coordinates that ``mask`` keeps, or all. A mask message holds those coordinates. No pickle.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from pydantic import NonNegativeInt

from opd.checked_json import TensorShape, read_json

FORMAT = "opd-weights-1"
DIGEST_BYTES, LENGTH_BYTES = 32, 8
PREFIX_BYTES = DIGEST_BYTES + LENGTH_BYTES
RECORD = np.dtype(
    [
        ("tensor", "<u4"),
        ("index_encoding", "u1"),
        ("value_encoding", "u1"),
        ("count", "<u8"),
        ("index_bytes", "<u8"),
        ("value_bytes", "<u8"),
    ]
)


class Kind(StrEnum):
    """What a message is for."""

    snapshot = "snapshot"
    patch = "patch"
    mask = "mask"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of the table."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """``run`` names the sender; ``mask`` is the fingerprint of the coordinates that indices count.

    ``dtype`` is the number format of every tensor: torch's name without ``torch.``.
    """

    kind: Kind
    run: str
    version: int
    base_version: int | None = None
    mask: str | None = None
    dtype: str | None = None
    table: tuple[TensorEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """What changes in one tensor: ``count`` indices and as many values, still encoded."""

    tensor: int
    index_encoding: int
    value_encoding: int
    count: int
    indices: bytes | memoryview
    values: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Message:
    """A message whose checksum and layout are sound; ``records`` point into its bytes."""

    header: Header
    records: list[Record]


@dataclass(frozen=True, slots=True, kw_only=True)
class _MessageFields:
    """The JSON header."""

    format: str
    kind: Kind
    run: str
    version: int
    records: NonNegativeInt
    base_version: int | None = None
    mask: str | None = None
    dtype: str | None = None
    table: tuple[tuple[str, TensorShape], ...] = ()


def write_message(header: Header, records: Iterable[Record], table: list[TensorEntry]) -> bytes:
    """The bytes. ``table`` is read after the last record, so that a stream of tensors may fill it."""
    out, rows = io.BytesIO(), []
    out.write(bytes(PREFIX_BYTES))
    for r in records:
        out.write(r.indices)
        out.write(r.values)
        sizes = (len(r.indices), len(r.values))
        rows.append((r.tensor, r.index_encoding, r.value_encoding, r.count, *sizes))
    out.write(np.array(rows, RECORD).tobytes())
    fields: dict[str, Any] = asdict(header) | {"format": FORMAT, "records": len(rows)}
    fields["table"] = [[e.name, list(e.shape)] for e in table]
    end = json.dumps({k: v for k, v in fields.items() if v not in (None, [])}).encode()
    out.write(end)
    with out.getbuffer() as whole:
        whole[DIGEST_BYTES:PREFIX_BYTES] = len(end).to_bytes(LENGTH_BYTES, "little")
        whole[:DIGEST_BYTES] = hashlib.sha256(whole[DIGEST_BYTES:]).digest()
    return out.getvalue()


def read_message(data: bytes) -> Message:
    """The inverse of ``write_message``; ``ValueError`` when a byte is not as it was sent."""
    whole = memoryview(data)
    if hashlib.sha256(whole[DIGEST_BYTES:]).digest() != whole[:DIGEST_BYTES]:
        raise ValueError(f"the checksum of the message's {len(data)} bytes does not agree")
    size = int.from_bytes(whole[DIGEST_BYTES:PREFIX_BYTES], "little")
    fields = read_json(
        bytes(whole[max(0, len(whole) - size) :]),
        _MessageFields,
        "the message's header",
        "send it again",
    )
    if fields.format != FORMAT:
        raise ValueError(f"format is {fields.format!r}, read is {FORMAT!r}")
    header = Header(
        kind=fields.kind,
        run=fields.run,
        version=fields.version,
        base_version=fields.base_version,
        mask=fields.mask,
        dtype=fields.dtype,
        table=tuple(TensorEntry(name=name, shape=shape) for name, shape in fields.table),
    )
    records_end = len(whole) - size
    start = records_end - fields.records * RECORD.itemsize
    if not PREFIX_BYTES <= start <= records_end:
        raise ValueError("the message announces more records than it holds")
    rows = np.frombuffer(whole[start:records_end], RECORD)
    return Message(header, list(_read_records(rows, whole[PREFIX_BYTES:start])))


def _read_records(rows: np.ndarray, payload: memoryview) -> Iterator[Record]:
    offset = 0
    for tensor, index_encoding, value_encoding, count, index_bytes, value_bytes in rows.tolist():
        middle, end = offset + index_bytes, offset + index_bytes + value_bytes
        indices, values = payload[offset:middle], payload[middle:end]
        yield Record(tensor, index_encoding, value_encoding, count, indices, values)
        offset = end
    if offset != len(payload):
        raise ValueError(f"the message's records cover {offset} of {len(payload)} bytes")
