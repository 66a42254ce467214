"""Indices and values survive their encoding, and take the fewest bytes."""

import numpy as np
import pytest

from opd.sync.encoding import (
    IndexEncoding,
    ValueEncoding,
    decode_indices,
    decode_values,
    encode_indices,
    encode_values,
)


def round_trip(indices: np.ndarray, size: int) -> tuple[IndexEncoding, int]:
    encoding, data = encode_indices(indices, size)
    decoded = decode_indices(encoding, memoryview(data), len(indices), size)
    assert decoded.tolist() == indices.tolist()
    return encoding, len(data)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.04, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 50_000])
def test_indices_come_back(size: int, share: float) -> None:
    draw = np.random.default_rng(size)
    round_trip(np.flatnonzero(draw.random(size) < share), size)


def test_the_encoding_follows_the_density() -> None:
    draw, size = np.random.default_rng(0), 100_000
    encodings = {
        share: round_trip(np.flatnonzero(draw.random(size) < share), size)
        for share in (0.0005, 0.02, 0.4, 1.1)
    }
    assert [encoding for encoding, _ in encodings.values()] == [
        IndexEncoding.gaps16,
        IndexEncoding.gaps8,
        IndexEncoding.bitmap,
        IndexEncoding.whole,
    ]
    assert encodings[0.02][1] < 1.02 * 0.02 * size
    assert encodings[0.4][1] == size / 8
    assert encodings[1.1][1] == 0


@pytest.mark.parametrize("gap", [253, 254, 255, 256, 65534, 65535, 65536, 2**32 - 1, 2**33])
def test_every_gap_around_an_escape_comes_back(gap: int) -> None:
    indices = np.array([gap, gap + 1, 2 * gap + 2, 2 * gap + 40])
    round_trip(indices, 2 * gap + 41)


def test_no_indices_take_no_bytes() -> None:
    assert round_trip(np.zeros(0, np.int64), 9)[1] == 0


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_values_come_back_whatever_the_difference(dtype: type) -> None:
    info = np.iinfo(dtype)
    edges = np.array([0, 1, -1, 127, -127, 128, -128, 32767, -32767, info.min, info.max], dtype)
    old = np.tile(edges, len(edges))
    new = np.repeat(edges, len(edges))
    encoding, data = encode_values(old, new)
    assert decode_values(encoding, memoryview(data), old).tolist() == new.tolist()


@pytest.mark.parametrize(
    ("spread", "encoding", "size"),
    [
        (1, ValueEncoding.ulps8, 1000),
        (20_000, ValueEncoding.ulps16, 2000),
        (2**30, ValueEncoding.plain, 4000),
    ],
)
def test_small_differences_take_small_codes(
    spread: int, encoding: ValueEncoding, size: int
) -> None:
    old = np.arange(1000, dtype=np.int32) * 1000
    new = old + np.where(np.arange(1000) % 2, spread, -spread).astype(np.int32)
    found, data = encode_values(old, new)
    assert (found, len(data)) == (encoding, size)
    assert decode_values(found, memoryview(data), old).tolist() == new.tolist()


def test_torn_or_false_bytes_are_refused() -> None:
    encoding, data = encode_indices(np.arange(0, 900, 9), 1000)
    with pytest.raises(ValueError, match="100 indices, its record says 101"):
        decode_indices(encoding, memoryview(data), 101, 1000)
    with pytest.raises(ValueError, match="outside its tensor"):
        decode_indices(encoding, memoryview(data), 100, 800)
    with pytest.raises(ValueError, match="bitmap of another length"):
        decode_indices(IndexEncoding.bitmap, memoryview(b"ab"), 3, 30)
    old = np.zeros(4, np.int16)
    with pytest.raises(ValueError, match="too few codes"):
        decode_values(ValueEncoding.ulps8, memoryview(b"abc"), old)
    with pytest.raises(ValueError, match="another length"):
        decode_values(ValueEncoding.plain, memoryview(b"abc"), old)
