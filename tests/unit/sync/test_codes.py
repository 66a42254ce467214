"""Places and values survive their encoding, and take the fewest bytes."""

import numpy as np
import pytest

from opd.sync.encoding import (
    IndexEncoding,
    ValueEncoding,
    decode_places,
    decode_values,
    encode_places,
    encode_values,
)


def again(places: np.ndarray, size: int) -> tuple[IndexEncoding, int]:
    form, data = encode_places(places, size)
    found = decode_places(form, memoryview(data), len(places), size)
    assert found.tolist() == places.tolist()
    return form, len(data)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.04, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 50_000])
def test_places_come_back(size: int, share: float) -> None:
    draw = np.random.default_rng(size)
    again(np.flatnonzero(draw.random(size) < share), size)


def test_the_form_follows_the_density() -> None:
    draw, size = np.random.default_rng(0), 100_000
    forms = {
        share: again(np.flatnonzero(draw.random(size) < share), size)
        for share in (0.0005, 0.02, 0.4, 1.1)
    }
    assert [form for form, _ in forms.values()] == [
        IndexEncoding.gaps16,
        IndexEncoding.gaps8,
        IndexEncoding.bitmap,
        IndexEncoding.whole,
    ]
    assert forms[0.02][1] < 1.02 * 0.02 * size
    assert forms[0.4][1] == size / 8
    assert forms[1.1][1] == 0


@pytest.mark.parametrize("gap", [253, 254, 255, 256, 65534, 65535, 65536, 2**32 - 1, 2**33])
def test_every_gap_around_an_escape_comes_back(gap: int) -> None:
    places = np.array([gap, gap + 1, 2 * gap + 2, 2 * gap + 40])
    again(places, 2 * gap + 41)


def test_no_place_is_a_form_too() -> None:
    assert again(np.zeros(0, np.int64), 9)[1] == 0


@pytest.mark.parametrize("kind", [np.int16, np.int32])
def test_values_come_back_whatever_the_difference(kind: type) -> None:
    info = np.iinfo(kind)
    edges = np.array([0, 1, -1, 127, -127, 128, -128, 32767, -32767, info.min, info.max], kind)
    old = np.tile(edges, len(edges))
    new = np.repeat(edges, len(edges))
    form, data = encode_values(old, new)
    assert decode_values(form, memoryview(data), old).tolist() == new.tolist()


@pytest.mark.parametrize(
    ("spread", "form", "size"),
    [
        (1, ValueEncoding.ulps8, 1000),
        (20_000, ValueEncoding.ulps16, 2000),
        (2**30, ValueEncoding.plain, 4000),
    ],
)
def test_small_differences_take_small_codes(spread: int, form: ValueEncoding, size: int) -> None:
    old = np.arange(1000, dtype=np.int32) * 1000
    new = old + np.where(np.arange(1000) % 2, spread, -spread).astype(np.int32)
    found, data = encode_values(old, new)
    assert (found, len(data)) == (form, size)
    assert decode_values(found, memoryview(data), old).tolist() == new.tolist()


def test_torn_or_false_bytes_are_refused() -> None:
    form, data = encode_places(np.arange(0, 900, 9), 1000)
    with pytest.raises(ValueError, match="announced were 101"):
        decode_places(form, memoryview(data), 101, 1000)
    with pytest.raises(ValueError, match="outside its tensor"):
        decode_places(form, memoryview(data), 100, 800)
    with pytest.raises(ValueError, match="bitmap of another length"):
        decode_places(IndexEncoding.bitmap, memoryview(b"ab"), 3, 30)
    old = np.zeros(4, np.int16)
    with pytest.raises(ValueError, match="too few codes"):
        decode_values(ValueEncoding.ulps8, memoryview(b"abc"), old)
    with pytest.raises(ValueError, match="another length"):
        decode_values(ValueEncoding.plain, memoryview(b"abc"), old)
