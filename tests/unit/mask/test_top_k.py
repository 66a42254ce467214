"""Streaming selection agrees with sorting everything, and breaks ties at random."""

import numpy as np
import pytest
import torch

from opd.checkpoint import chunks as chunks_module
from opd.checkpoint.chunks import Chunk
from opd.mask import file as mask_file
from opd.mask.top_k import Selection, TopKQuery, sortable, tiebreak

SHAPES = {"a": (70, 31), "b": (5,), "c": (400, 10), "nothing": (0, 4)}
SIZES = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CHUNK", 257)


def kept(values: dict[str, np.ndarray], quota: int, salt: str = "0") -> dict[str, np.ndarray]:
    """The chosen coordinates of each parameter as bools."""

    def read(chunk: Chunk) -> np.ndarray:
        return values[chunk.name][chunk.start : chunk.stop]

    query = TopKQuery(names=tuple(values), quotas=(quota,), scores=read)
    selection = Selection({name: SHAPES[name] for name in values}, salt)
    chosen = {name: np.zeros(len(v), bool) for name, v in values.items()}
    for name, index in selection.select(query, selection.find_threshold(query)):
        assert (index[1:] > index[:-1]).all()
        chosen[name][index.numpy()] = True
    return chosen


def scored(kind: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {
        "normal": lambda n: rng.normal(size=n),
        "few values": lambda n: rng.integers(-2, 3, n),
        "close": lambda n: 1 + rng.integers(0, 40, n) * 2.0**-23,
        "all equal": lambda n: np.full(n, -3.5),
        "extremes": lambda n: rng.choice([0.0, -0.0, np.inf, -np.inf, 1e-44, 3e38], n),
    }[kind]
    return {name: made(size).astype(np.float32) for name, size in SIZES.items()}


@pytest.mark.parametrize("quota", [0, 1, 2, 777, TOTAL - 1, TOTAL])
@pytest.mark.parametrize("kind", ["normal", "few values", "close", "all equal", "extremes"])
def test_the_chosen_are_the_highest_and_exactly_as_many(kind: str, quota: int) -> None:
    values = scored(kind)
    chosen = kept(values, quota)
    everything = np.concatenate([values[name] for name in SIZES])
    taken = np.concatenate([chosen[name] for name in SIZES])
    assert taken.sum() == quota
    best = np.sort(everything)[::-1][:quota]
    assert (np.sort(everything[taken])[::-1] == best).all()


def test_keys_sort_as_their_scores() -> None:
    scores = np.concatenate([scored("normal")["a"], scored("extremes")["a"]])
    order = np.argsort(sortable(scores), kind="stable")
    assert (np.diff(scores[order][np.isfinite(scores[order])]) >= 0).all()
    assert sortable(np.float32([0.0]))[0] == sortable(np.float32([-0.0]))[0]


def test_equal_scores_are_parted_without_regard_to_order() -> None:
    places = np.zeros(SIZES["c"])
    for salt in range(60):
        chosen = kept({"c": np.zeros(SIZES["c"], np.float32)}, 1000, str(salt))["c"]
        places += chosen
    for part in np.array_split(places, 8):  # each has 500 places, of which 1 in 4 is kept
        assert abs(part.mean() / 60 - 0.25) < 0.01
    assert places.max() < 60
    assert places.min() >= 0
    assert abs(places.var() - 60 * 0.25 * 0.75) < 1.5


def test_equal_tiebreaks_are_broken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(salt: str, name: str, coordinates: np.ndarray) -> np.ndarray:
        return np.full(len(coordinates), 9, np.uint64)

    monkeypatch.setattr("opd.mask.top_k.tiebreak", same)
    chosen = kept(scored("few values"), 1234)
    assert sum(c.sum() for c in chosen.values()) == 1234


def test_tiebreaks_depend_on_salt_name_and_coordinate_only() -> None:
    drawn = tiebreak("1", "w", np.arange(100_000))
    assert (drawn[500:] == tiebreak("1", "w", np.arange(500, 100_000))).all()
    assert (drawn < 2**32).all()
    for other in (tiebreak("2", "w", np.arange(100_000)), tiebreak("1", "v", np.arange(100_000))):
        assert abs(np.corrcoef(drawn.astype(float), other.astype(float))[0, 1]) < 0.02
    assert abs(drawn.mean() / 2**32 - 0.5) < 0.005


def test_the_result_does_not_depend_on_the_size_of_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    small = kept(scored("few values"), 2000)
    monkeypatch.setattr(chunks_module, "CHUNK", 1 << 20)
    large = kept(scored("few values"), 2000)
    assert all((small[name] == large[name]).all() for name in SIZES)


def test_large_tensors_get_int64_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    values = scored("few values")
    narrow = kept(values, 500)
    monkeypatch.setattr(mask_file, "INT32_MAX", 1000)
    query = TopKQuery(
        names=tuple(SIZES), quotas=(500,), scores=lambda p: values[p.name][p.start : p.stop]
    )
    selection = Selection(SHAPES, "0")
    for name, index in selection.select(query, selection.find_threshold(query)):
        assert index.dtype == torch.int64
        assert (np.flatnonzero(narrow[name]) == index.numpy()).all()
