"""A function of the user's ranks weights as a built-in rule does, or is refused in a sentence."""

from pathlib import Path

import numpy as np
import pytest
import torch

from opd.checkpoint import chunks as chunks_module
from opd.checkpoint.chunks import Chunk, quiet
from opd.checkpoint.tensors import open_checkpoint
from opd.config.mask import MaskRule, RuleConfig
from opd.mask.mask import Mask
from opd.mask.spool import spool_scores
from tests.unit.mask.models import SHAPES, discovered, flat, joined, stored, weights

FUNCTIONS = """
import torch

def smallest(name, weight):
    return -weight.abs()

def largest_in_float64(name, weight):
    return weight.double().abs()

def norms_only(name, weight):
    return torch.full(weight.shape, float("norm" in name))

def sums(name, weight):
    return weight.sum(-1)

def undefined(name, weight):
    return weight.float() * (float("nan") if "norm" in name else 1.0)
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("models") / "base", weights())


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("code") / "scores_of_mine.py"
    file.write_text(FUNCTIONS)
    return file


def test_minus_the_magnitude_is_near_zero_up_to_ties(base: Path, functions: Path) -> None:
    mine = flat(Mask.discover(base, "function", function=f"{functions}:smallest", density=0.2))
    rule = flat(Mask.discover(base, "near_zero", density=0.2))
    size = np.abs(joined(weights()))
    boundary = size[rule].max()
    assert size[mine].max() == boundary
    assert mine.sum() == rule.sum()
    assert (mine == rule)[size != boundary].all()
    assert (size == boundary).sum() > 1


def test_scores_of_any_number_format_and_chunk_size_rank_the_same(
    base: Path, functions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"function": f"{functions}:largest_in_float64", "density": 0.3}
    found = flat(Mask.discover(base, "function", **settings))
    size = np.abs(joined(weights()))
    assert size[found].min() >= size[~found].max()
    monkeypatch.setattr(chunks_module, "CHUNK", 101)
    assert (flat(Mask.discover(base, "function", **settings)) == found).all()


def test_a_function_may_go_by_the_name_and_take_a_threshold(base: Path, functions: Path) -> None:
    mask = Mask.discover(base, "function", function=f"{functions}:norms_only", threshold=0.5)
    for name, count in mask.counts().items():
        assert count == (mask.numel(name) if "norm" in name else 0)
    assert mask.origin.rule == "function"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sums", r"sums returned scores of shape \[90\] for model\.embed_tokens\.weight, expected"),
        ("undefined", r"layernorm\.weight of function=.*undefined contains NaN"),
        ("absent", r"cannot be imported: .*absent"),
    ],
)
def test_a_function_that_cannot_rank_is_refused_in_a_sentence(
    base: Path, functions: Path, tmp_path: Path, name: str, words: str
) -> None:
    config = RuleConfig(rule=MaskRule.function, function=f"{functions}:{name}", density=0.1)
    with pytest.raises(ValueError, match=words) as raised:
        discovered(base, config, tmp_path / "m")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_spooled_scores_are_computed_once_and_read_by_chunk(base: Path, tmp_path: Path) -> None:
    checkpoint, computed = open_checkpoint(str(base)), []

    def scores(name: str, tensor: object) -> list[np.ndarray]:
        computed.append(name)
        values = np.arange(torch.Size(SHAPES[name]).numel(), dtype=np.float32)
        return np.array_split(values + len(computed), 3)

    read = spool_scores(checkpoint, scores, tmp_path / "scores", quiet, "scoring")
    for number, name in enumerate(checkpoint, start=1):
        for start, stop in ((0, 5), (7, 24)):
            expected = np.arange(start, stop, dtype=np.float32) + number
            assert (read(Chunk(name, start, stop)) == expected).all()
    assert computed == list(checkpoint)
    assert (tmp_path / "scores").stat().st_size == 4 * checkpoint.numel
