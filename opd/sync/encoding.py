"""Exact, small encodings of which coordinates changed, and by how much. Plain numpy.

An index counts within a tensor's domain: all its coordinates, or the ones that a mask keeps, in
order. A value is the integer that holds a floating-point number's bits, so NaN and -0.0 are values
like any other.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

Indices64 = npt.NDArray[np.int64]
Bits = npt.NDArray[np.signedinteger]


class IndexEncoding(IntEnum):
    """How indices are stored. A gap counts the indices skipped since the last one."""

    whole = 0
    """not at all: every index of the domain"""
    bitmap = 1
    """one bit for each index of the domain"""
    gaps8 = 2
    """one byte for each gap; 255 means: skip 255 and read on"""
    gaps16 = 3
    gaps32 = 4


class ValueEncoding(IntEnum):
    """How values are stored. An ulp code is new bits minus old bits, wrapping."""

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


def encode_indices(indices_n: Indices64, size: int) -> tuple[IndexEncoding, bytes]:
    """The smallest encoding of ``indices_n``, which rise strictly within 0 to ``size`` - 1."""
    if len(indices_n) == size:
        return IndexEncoding.whole, b""
    gaps_n = np.diff(indices_n, prepend=-1) - 1
    lengths = {IndexEncoding.bitmap: (size + 7) // 8}
    for encoding, dtype in _GAP_TYPES.items():
        skips = int((gaps_n // np.iinfo(dtype).max).sum())
        lengths[encoding] = (len(gaps_n) + skips) * dtype.itemsize
    encoding = min(lengths, key=lambda e: lengths[e])
    if encoding == IndexEncoding.bitmap:
        is_set = np.zeros(size, np.bool_)
        is_set[indices_n] = True
        return encoding, np.packbits(is_set).tobytes()
    skip = np.iinfo(_GAP_TYPES[encoding]).max
    skips_n, rest_n = np.divmod(gaps_n, skip)
    codes = np.full(len(gaps_n) + int(skips_n.sum()), skip, _GAP_TYPES[encoding])
    codes[np.cumsum(skips_n + 1) - 1] = rest_n
    return encoding, codes.tobytes()


def decode_indices(encoding: IndexEncoding, data: memoryview, count: int, size: int) -> Indices64:
    """The inverse of ``encode_indices``; ``ValueError`` unless it gives ``count`` below ``size``."""
    if encoding == IndexEncoding.whole:
        indices_n = np.arange(size)
    elif encoding == IndexEncoding.bitmap:
        _require(len(data) == (size + 7) // 8, "a bitmap of another length")
        is_set = np.unpackbits(np.frombuffer(data, np.uint8), count=size)
        indices_n = np.flatnonzero(is_set)
    else:
        dtype = _GAP_TYPES[encoding]
        _require(len(data) % dtype.itemsize == 0, "a truncated gap")
        codes = np.frombuffer(data, dtype)
        ends = codes != np.iinfo(dtype).max
        skipped_n = np.cumsum(codes, dtype=np.int64)[ends]
        indices_n = skipped_n + np.arange(len(skipped_n))
    _require(len(indices_n) == count, f"{len(indices_n)} indices, its record says {count}")
    _require(count == 0 or int(indices_n[-1]) < size, "an index outside its tensor")
    return indices_n


def encode_values(old_n: Bits, new_n: Bits) -> tuple[ValueEncoding, bytes]:
    """The smallest encoding of ``new_n`` for a receiver of ``old_n``, of the same integer type."""
    item = new_n.dtype.itemsize
    best, length = ValueEncoding.plain, new_n.nbytes
    delta_n = new_n - old_n
    for encoding, dtype in _ULP_TYPES.items():
        if dtype.itemsize < item:
            far = int(np.count_nonzero(_has_no_code(delta_n, dtype)))
            coded = len(new_n) * dtype.itemsize + far * item
            if coded < length:
                best, length = encoding, coded
    if best == ValueEncoding.plain:
        return best, new_n.tobytes()
    dtype = _ULP_TYPES[best]
    far_n = _has_no_code(delta_n, dtype)
    codes = np.where(far_n, np.iinfo(dtype).min, delta_n).astype(dtype)
    return best, codes.tobytes() + new_n[far_n].tobytes()


def decode_values(encoding: ValueEncoding, data: memoryview, old_n: Bits) -> Bits:
    """The inverse of ``encode_values``; ``ValueError`` when the bytes are too few or too many."""
    own = old_n.dtype
    if encoding == ValueEncoding.plain:
        _require(len(data) == old_n.nbytes, "values of another length")
        return np.frombuffer(data, own)
    dtype = _ULP_TYPES[encoding]
    coded = len(old_n) * dtype.itemsize
    _require(len(data) >= coded, "too few codes")
    codes = np.frombuffer(data[:coded], dtype)
    far_n = codes == np.iinfo(dtype).min
    _require(
        len(data) - coded == int(np.count_nonzero(far_n)) * own.itemsize, "values of another length"
    )
    new_n = old_n + codes.astype(own)
    new_n[far_n] = np.frombuffer(data[coded:], own)
    return new_n


def _has_no_code(delta_n: Bits, dtype: np.dtype) -> npt.NDArray[np.bool_]:
    """Where a difference has no code; the most negative number is the escape."""
    largest = np.iinfo(dtype).max
    return (delta_n > largest) | (delta_n < -largest)


def _require(condition: bool, found: str) -> None:
    if not condition:
        raise ValueError(f"the message holds {found}")
