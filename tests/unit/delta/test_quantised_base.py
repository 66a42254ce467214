"""An FP8 base is exported, applied and analysed as the weights that it stands for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from opd.checkpoint.tensors import open_checkpoint
from opd.delta.export import export_delta
from opd.delta.rebuild import write_trained
from opd.mask.rules import delta as changes
from tests.unit.checkpoint.models import Tensors, configured, saved, written

SETTINGS = {"quant_method": "fp8", "weight_block_size": [8, 8]}


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path, Tensors]:
    """A base in FP8, the same weights moved in bfloat16, and the weights of the base."""
    tensors = saved("llama", tmp_path / "base", tie_word_embeddings=True)
    stored: Tensors = {}
    for name, tensor in tensors.items():
        stored[name] = tensor.bfloat16()
        if name.endswith("_proj.weight"):
            stored[name] = (tensor * 64).to(torch.float8_e4m3fn)
            stored[name + "_scale_inv"] = torch.full(
                (-(-len(tensor) // 8), tensor.shape[1] // 8), 1 / 64
            )
    written(tmp_path / "base", stored)
    configured(tmp_path / "base", quantization_config=SETTINGS, dtype="bfloat16")
    plain = {name: part.read() for name, part in open_checkpoint(str(tmp_path / "base")).items()}
    written(tmp_path / "trained", {n: (t.float() * 1.01).bfloat16() for n, t in plain.items()})
    configured(tmp_path / "trained", model_type="llama", tie_word_embeddings=True)
    return tmp_path / "base", tmp_path / "trained", plain


def test_the_dequantised_weights_are_the_base(models: tuple[Path, Path, Tensors]) -> None:
    base, _, plain = models
    original = json.loads((base / "config.json").read_text())
    assert original["quantization_config"] == SETTINGS
    assert {tensor.dtype for tensor in plain.values()} == {torch.bfloat16}
    assert not [name for name in plain if "scale" in name]


def test_an_exported_difference_rebuilds_a_plain_model(
    models: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    base, trained = (open_checkpoint(str(folder)) for folder in models[:2])
    made = export_delta(base, trained, tmp_path / "x.safetensors")
    write_trained(base, made, tmp_path / "again")
    rebuilt = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(rebuilt[name], trained[name].read()) for name in trained)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["model_type"] == "llama"


def test_analysis_and_masks_see_weights_and_no_codes(
    models: tuple[Path, Path, Tensors], tmp_path: Path
) -> None:
    base, trained, plain = models
    inputs = AnalysisInputs(base=str(base), trained=str(trained))
    rows = measure_checkpoints(inputs, tmp_path / "out")
    assert [row["status"] for row in rows] == ["ok"] * len(plain)
    for row in rows:
        if row["name"].endswith("proj.weight"):
            assert row["bf16"]["relative_norm"] == pytest.approx(0.01, rel=0.2)
    changes(open_checkpoint(str(base)), open_checkpoint(str(trained)), "trained")
