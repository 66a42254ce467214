"""Exact and small: where coordinates changed, and by how much, as bytes. Plain numpy.

A place is a position in a tensor's domain: all its coordinates, or the ones that a mask keeps, in
order. A value is the integer that holds a floating number's bits, so NaN and -0.0 are values like
any other.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Indices64 = npt.NDArray[np.int64]
Bits = npt.NDArray[np.signedinteger]


class IndexEncoding(IntEnum):
    """How places travel. A gap counts the places skipped since the last one."""

    whole = 0
    """not at all: every place of the domain"""
    bitmap = 1
    """one bit for each place of the domain"""
    gaps8 = 2
    """one byte for each gap; 255 means: skip 255 and read on"""
    gaps16 = 3
    gaps32 = 4


class ValueEncoding(IntEnum):
    """How values travel. An ulp code is new bits minus old bits, wrapping."""

    plain = 0
    ulps8 = 1
    """one byte for each code; -128 means: the value itself is in the list behind the codes"""
    ulps16 = 2


_GAP_TYPES = {
    IndexEncoding.gaps8: np.dtype("<u1"),
    IndexEncoding.gaps16: np.dtype("<u2"),
    IndexEncoding.gaps32: np.dtype("<u4"),
}
_ULP_TYPES = {ValueEncoding.ulps8: np.dtype("<i1"), ValueEncoding.ulps16: np.dtype("<i2")}


def encode_places(places_n: Indices64, size: int) -> tuple[IndexEncoding, bytes]:
    """The smallest form of ``places_n``, which rise strictly within 0 to ``size`` - 1."""
    if len(places_n) == size:
        return IndexEncoding.whole, b""
    gaps_n = np.diff(places_n, prepend=-1) - 1
    lengths = {IndexEncoding.bitmap: (size + 7) // 8}
    for form, kind in _GAP_TYPES.items():
        skips = int((gaps_n // np.iinfo(kind).max).sum())
        lengths[form] = (len(gaps_n) + skips) * kind.itemsize
    form = min(lengths, key=lambda f: lengths[f])
    if form == IndexEncoding.bitmap:
        there = np.zeros(size, np.bool_)
        there[places_n] = True
        return form, np.packbits(there).tobytes()
    skip = np.iinfo(_GAP_TYPES[form]).max
    skips_n, rest_n = np.divmod(gaps_n, skip)
    codes = np.full(len(gaps_n) + int(skips_n.sum()), skip, _GAP_TYPES[form])
    codes[np.cumsum(skips_n + 1) - 1] = rest_n
    return form, codes.tobytes()


def decode_places(form: IndexEncoding, data: memoryview, count: int, size: int) -> Indices64:
    """The undo of ``encode_places``; ``ValueError`` unless it gives ``count`` places below ``size``."""
    if form == IndexEncoding.whole:
        places_n = np.arange(size)
    elif form == IndexEncoding.bitmap:
        _require(len(data) == (size + 7) // 8, "a bitmap of another length")
        there = np.unpackbits(np.frombuffer(data, np.uint8), count=size)
        places_n = np.flatnonzero(there)
    else:
        kind = _GAP_TYPES[form]
        _require(len(data) % kind.itemsize == 0, "a torn gap")
        codes = np.frombuffer(data, kind)
        ends = codes != np.iinfo(kind).max
        skipped_n = np.cumsum(codes, dtype=np.int64)[ends]
        places_n = skipped_n + np.arange(len(skipped_n))
    _require(len(places_n) == count, f"{len(places_n)} places, announced were {count}")
    _require(count == 0 or int(places_n[-1]) < size, "a place outside its tensor")
    return places_n


def encode_values(old_n: Bits, new_n: Bits) -> tuple[ValueEncoding, bytes]:
    """The smallest form of ``new_n`` for somebody who holds ``old_n``, of the same integer type."""
    item = new_n.dtype.itemsize
    best, length = ValueEncoding.plain, new_n.nbytes
    delta_n = new_n - old_n
    for form, kind in _ULP_TYPES.items():
        if kind.itemsize < item:
            far = int(np.count_nonzero(_far(delta_n, kind)))
            coded = len(new_n) * kind.itemsize + far * item
            if coded < length:
                best, length = form, coded
    if best == ValueEncoding.plain:
        return best, new_n.tobytes()
    kind = _ULP_TYPES[best]
    far_n = _far(delta_n, kind)
    codes = np.where(far_n, np.iinfo(kind).min, delta_n).astype(kind)
    return best, codes.tobytes() + new_n[far_n].tobytes()


def decode_values(form: ValueEncoding, data: memoryview, old_n: Bits) -> Bits:
    """The undo of ``encode_values``; ``ValueError`` when the bytes are too few or too many."""
    own = old_n.dtype
    if form == ValueEncoding.plain:
        _require(len(data) == old_n.nbytes, "values of another length")
        return np.frombuffer(data, own)
    kind = _ULP_TYPES[form]
    coded = len(old_n) * kind.itemsize
    _require(len(data) >= coded, "too few codes")
    codes = np.frombuffer(data[:coded], kind)
    far_n = codes == np.iinfo(kind).min
    _require(
        len(data) - coded == int(np.count_nonzero(far_n)) * own.itemsize, "values of another length"
    )
    new_n = old_n + codes.astype(own)
    new_n[far_n] = np.frombuffer(data[coded:], own)
    return new_n


def _far(delta_n: Bits, kind: np.dtype) -> npt.NDArray[np.bool_]:
    """Where a difference has no code; the most negative number is the escape."""
    most = np.iinfo(kind).max
    return (delta_n > most) | (delta_n < -most)


def _require(sound: bool, found: str) -> None:
    if not sound:
        raise ValueError(f"the message holds {found}")
