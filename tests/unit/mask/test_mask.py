"""A mask is read, discovered and combined as sets are; a file that is not one is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.config.mask import MaskBudget, MaskRule, RuleConfig
from opd.mask import file as mask_file
from opd.mask.file import FORMAT, Origin
from opd.mask.mask import Mask, isin_sorted
from tests.unit.mask.models import NUMEL, discovered, stored, weights

SHAPES = {"a": (4, 10), "b": (7,), "empty": (3, 3), "whole": (5,)}
ORIGIN = Origin(rule="random", base="f" * 32, model="somewhere", seed=3, command="opd mask 'x y'")


def some(seed: int, **origin: str) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    indices = {
        "a": torch.randperm(40, generator=generator)[:15].sort().values.int(),
        "b": torch.randperm(7, generator=generator)[:3].sort().values.int(),
        "empty": torch.zeros(0, dtype=torch.int32),
        "whole": torch.arange(5, dtype=torch.int32),
    }
    if origin:
        return Mask(indices=indices, shapes=SHAPES, origin=Origin(**origin))
    return Mask(indices=indices, shapes=SHAPES, origin=ORIGIN)


def sets(mask: Mask) -> dict[str, set[int]]:
    return {name: set(mask.indices[name].tolist()) for name in mask.shapes}


def test_a_saved_mask_comes_back(tmp_path: Path) -> None:
    mask = some(0)
    mask.save(tmp_path / "folder" / "m.safetensors")
    back = Mask.read(tmp_path / "folder" / "m.safetensors")
    assert sets(back) == sets(mask)
    assert back.origin == mask.origin
    assert dict(back.shapes) == SHAPES
    assert back.density == mask.density == 23 / 61
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["m.safetensors"]


def test_int64_coordinates_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_file, "INT32_MAX", 30)
    some(0).save(tmp_path / "m")
    back = Mask.read(tmp_path / "m")
    assert back.indices["a"].dtype == torch.int64
    assert sets(back) == sets(some(0))


@pytest.mark.parametrize("seed", range(5))
def test_masks_combine_as_sets_do(tmp_path: Path, seed: int) -> None:
    a, b = some(seed), some(seed + 100)
    for name, made, combine in (
        ("union", a.union(b), set.union),
        ("intersection", a.intersection(b), set.intersection),
        ("difference", a.difference(b), set.difference),
    ):
        made.save(tmp_path / name)
        back = Mask.read(tmp_path / name)
        for key in SHAPES:
            assert sets(back)[key] == combine(sets(a)[key], sets(b)[key])
        assert back.origin.rule == f"{name}(random, random)"


def test_isin_sorted_is_membership() -> None:
    a, b = torch.tensor([1, 3, 5, 900]), torch.tensor([0, 3, 4, 5])
    assert isin_sorted(a, b).tolist() == [False, True, True, False]
    assert isin_sorted(a, b[:0]).tolist() == [False] * 4
    assert isin_sorted(a[:0], b).tolist() == []


def test_another_base_is_refused() -> None:
    with pytest.raises(ValueError, match=r"made for somewhere .* found elsewhere"):
        some(0).require_base("e" * 32, "elsewhere")
    with pytest.raises(ValueError, match="made for elsewhere"):
        some(0).union(some(1, rule="random", base="e" * 32, model="elsewhere"))


def test_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b is \[7\] in the mask and \[8\] in the model"):
        some(0).require_parameters(SHAPES | {"b": (8,)})
    with pytest.raises(ValueError, match="c is absent in the mask"):
        some(0).require_parameters(SHAPES | {"c": (8,)})


def test_a_file_that_is_cut_short_is_refused(tmp_path: Path) -> None:
    some(0).save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for length in (0, 5, 60, len(data) - 4):
        (tmp_path / "m").write_bytes(data[:length])
        with pytest.raises(ValueError, match="cannot be read as a mask"):
            Mask.read(tmp_path / "m")


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="is not an opd mask file"):
        Mask.read(tmp_path / "weights")
    with pytest.raises(ValueError, match="there is no mask file"):
        Mask.read(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "index", [[3, 2, 1], [1, 1, 2], [-1, 2, 3], [5, 39, 40]], ids=["unsorted", "twice", "-1", "40"]
)
def test_impossible_coordinates_are_refused(tmp_path: Path, index: list[int]) -> None:
    some(0).save(tmp_path / "m")
    tensors = load_file(tmp_path / "m") | {"a": torch.tensor(index, dtype=torch.int32)}
    header = {"rule": "x", "base": "y", "model": "z", "seed": "0", "command": ""}
    shapes = json.dumps({name: list(shape) for name, shape in SHAPES.items()})
    save_file(tensors, tmp_path / "m", {"format": FORMAT, "shapes": shapes, **header})
    with pytest.raises(ValueError, match="not a sorted list of indices below 40"):
        _ = Mask.read(tmp_path / "m").indices["a"]


def test_reading_takes_a_path_as_text_too(tmp_path: Path) -> None:
    some(0).save(tmp_path / "m")
    assert Mask.read(str(tmp_path / "m")).fingerprint() == some(0).fingerprint()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("models") / "base", weights())


def test_discover_finds_the_mask_that_the_rule_config_describes(base: Path, tmp_path: Path) -> None:
    config = RuleConfig(rule=MaskRule.near_zero, density=0.1, budget=MaskBudget.module)
    expected, _ = discovered(base, config, tmp_path / "expected")
    held = Mask.discover(base, rule="near_zero", density=0.1, budget="module")
    assert held.fingerprint() == expected.fingerprint()
    assert held.origin == expected.origin
    assert held.density == pytest.approx(0.1, abs=1 / NUMEL)
    assert [p.name for p in tmp_path.iterdir()] == ["expected"]


def test_discover_writes_the_mask_where_it_is_told(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "m.safetensors"
    found = Mask.discover(str(base), rule="near_zero", density=0.1, out=out)
    assert Mask.read(out).fingerprint() == found.fingerprint()
    assert found.fingerprint() == Mask.discover(base, "near_zero", density=0.1).fingerprint()
    assert [p.name for p in out.parent.iterdir()] == ["m.safetensors"]
    like = Mask.discover(base, "random", like=out, seed=4)
    assert like.counts() == found.counts()
    assert like.fingerprint() != found.fingerprint()


def test_discover_warns_of_settings_without_effect(base: Path) -> None:
    with pytest.warns(UserWarning, match="exclude=typo. matches no parameter"):
        Mask.discover(base, "random", density=0.1, exclude=["typo*"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": "best", "density": 0.1}, r"rule=best: expected one of delta, early_delta"),
        ({"rule": "near_zero", "densty": 0.1}, r"densty is not a key here: did you mean density\?"),
        ({"rule": "near_zero", "density": 2}, r"density=2\.0: allowed is 1 or less"),
        ({"rule": "near_zero", "density": 0.1, "trained": "x"}, "trained=x has no effect"),
        ({"rule": "random", "like": "m", "density": 0.1}, "has no effect beside like=m"),
        ({"density": 0.1}, "rule=delta needs trained"),
    ],
)
def test_discover_refuses_settings_in_a_sentence(
    base: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words) as raised:
        Mask.discover(base, out=tmp_path / "m", **settings)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "m").exists()
