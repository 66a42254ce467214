"""A SHiRA adapter made from a sparse checkpoint is the trained model once PEFT has loaded it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opd.cli.main import run

Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
K = "model.layers.1.self_attn.k_proj.weight"
NORM, HEAD_NORM = "model.norm.weight", "model.layers.1.self_attn.q_norm.weight"
EMBEDDING = "model.embed_tokens.weight"
Change = Callable[[dict[str, torch.Tensor]], None]
Train = Callable[..., tuple[Path, Path]]
FORMAT = "format=shira"


@pytest.fixture
def train(quickstart: Path, tmp_path: Path) -> Train:
    """Writes the quickstart student in a number format, and a copy after ``change``."""

    def write(dtype: torch.dtype, change: Change) -> tuple[Path, Path]:
        torch.manual_seed(0)
        weights = {
            n: t.to(dtype) for n, t in load_file(quickstart / "student/model.safetensors").items()
        }
        folders = tmp_path / "base", tmp_path / "trained"
        for folder in folders:
            folder.mkdir()
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            for name in ("config.json", "generation_config.json"):
                (folder / name).write_bytes((quickstart / "student" / name).read_bytes())
            change(weights)
        return folders

    return write


def some(weights: dict[str, torch.Tensor], name: str, count: int) -> tuple[torch.Tensor, ...]:
    """A view of a tensor as a list, and ``count`` random coordinates of it."""
    flat = weights[name].view(-1)
    return flat, torch.randperm(len(flat))[:count]


def a_little(weights: dict[str, torch.Tensor]) -> None:
    """As training does: every new value within a factor of two of the old one; unequal counts."""
    for name, count in ((Q, 1), (DOWN, 5000), (K, 777), (NORM, 100), (HEAD_NORM, 3)):
        flat, where = some(weights, name, count)
        flat[where] *= 1 + 0.4 * torch.rand(count).to(flat.dtype)


def a_lot(weights: dict[str, torch.Tensor]) -> None:
    """Values of another size altogether, signs turned, zeros made and filled."""
    for name in (Q, DOWN, K):
        flat, where = some(weights, name, 2000)
        flat[where] = (torch.randn(2000) * 10.0 ** torch.randint(-6, 0, (2000,))).to(flat.dtype)
        flat[where[:100]] = 0


def loaded(base: Path, adapter: Path, dtype: torch.dtype) -> torch.nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(2, 32)[None]).logits


def plain(model: Path, dtype: torch.dtype) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()


def export(base: Path, trained: Path, *more: str) -> int:
    out = base.parent / "adapter"
    return run(
        ["mask", "export", f"base={base}", f"trained={trained}", f"out={out}", FORMAT, *more]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_training_changed_loads_as_an_adapter(
    train: Train, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    base, trained = train(dtype, a_little)
    assert export(base, trained) == 0
    assert "r=10, " in capsys.readouterr().out  # 5000 changes of 384 + 128
    adapted, expected = (
        logits(loaded(base, tmp_path / "adapter", dtype)),
        logits(plain(trained, dtype)),
    )
    assert not torch.equal(expected, logits(plain(base, dtype)))
    if dtype == torch.bfloat16:
        assert torch.equal(adapted, expected)
    else:
        torch.testing.assert_close(adapted, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_a_unit_in_the_last_place_away_at_most(
    train: Train, tmp_path: Path, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]
) -> None:
    base, trained = train(dtype, a_lot)
    assert export(base, trained) == 0
    merged = loaded(base, tmp_path / "adapter", dtype).merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    after = load_file(trained / "model.safetensors")
    missed = 0
    for name, expected in after.items():
        unit = torch.finfo(dtype).eps * torch.maximum(before[name].abs(), expected.abs())
        assert bool(((merged[name] - expected).abs() <= unit).all()), name
        missed += int((merged[name] != expected).sum())
    assert f"{missed:,} weights a rounding away" in capsys.readouterr().out


def test_what_an_adapter_cannot_hold_is_refused_by_name_or_dropped(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        a_little(weights)
        weights[EMBEDDING][3] += 1
        weights[DOWN] *= -1
        weights[Q][0, 0] = float("inf")

    base, trained = train(torch.bfloat16, change)
    assert export(base, trained) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for words in (
        "cannot hold 3",
        f"{EMBEDDING} (Embedding)",
        f"{DOWN} (49152 changes need r=96, and {K} has room for r=42)",
        f"{Q} (values that are not finite)",
        "others=drop",
    ):
        assert words in error, error
    assert not (tmp_path / "adapter").exists()

    assert export(base, trained, "others=drop") == 0
    assert f"left out {EMBEDDING}" in capsys.readouterr().err
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [K.removesuffix(".weight")]
    merged = loaded(base, tmp_path / "adapter", torch.bfloat16).merge_and_unload().state_dict()
    before = load_file(base / "model.safetensors")
    after = load_file(trained / "model.safetensors")
    assert torch.equal(merged[EMBEDDING], before[EMBEDDING])
    assert torch.equal(merged[K], after[K])
    assert torch.equal(merged[NORM], after[NORM])


def test_a_model_that_did_not_change_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    base, trained = train(torch.bfloat16, lambda weights: None)
    assert export(base, trained) == 2
    assert "base and trained are the same" in capsys.readouterr().err
