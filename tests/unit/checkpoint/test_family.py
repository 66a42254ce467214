"""Names and layouts in memory are asked of transformers, for every family that it knows."""

from pathlib import Path

import pytest
import torch

from opd.checkpoint.family import Family, read_family
from tests.unit.checkpoint.models import configured


def family(folder: Path, kind: str) -> Family:
    configured(folder, model_type=kind)
    found = read_family(folder)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("kind", "stored", "in_memory"),
    [
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("gpt2", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("llama", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llava", "language_model.lm_head.weight", "lm_head.weight"),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.gate.weight",
            "model.layers.0.mlp.gate.weight",
        ),
    ],
)
def test_a_stored_name_is_that_of_the_loaded_parameter(
    tmp_path: Path, kind: str, stored: str, in_memory: str
) -> None:
    found = family(tmp_path, kind)
    assert found.renamed(stored) == in_memory
    assert found.renamed(in_memory) == in_memory
    assert found.is_parameter(stored)
    assert not found.is_parameter("nowhere.weight")


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_layout_that_loading_transposes_is_that_of_memory(
    tmp_path: Path, is_transposed: bool
) -> None:
    found = family(tmp_path, "qwen3_vl_moe")
    name = "model.language_model.layers.0.mlp.experts.down_proj"
    shape = tuple(dict(found.model.named_parameters())[name].shape)
    stored = (shape[0], shape[2], shape[1]) if is_transposed else shape
    conversion = found.conversion(found.renamed(name), stored)
    assert conversion is not None
    assert conversion.shapes == {name: shape}


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_stacked_experts_come_apart_as_files_hold_them(tmp_path: Path, kind: str) -> None:
    found = family(tmp_path, kind)
    name = "model.layers.5.mlp.experts.down_proj"
    conversion = found.conversion(name, (3, 4, 6))
    assert conversion is not None
    leaf = "w2" if kind == "mixtral" else "down_proj"
    stacked = torch.arange(72.0).reshape(3, 4, 6)
    parts = conversion.apply(stacked)
    assert list(parts) == [f"model.layers.5.mlp.experts.{n}.{leaf}.weight" for n in range(3)]
    assert all(torch.equal(part, stacked[n]) for n, part in enumerate(parts.values()))


@pytest.mark.parametrize("config", ["{}", '{"model_type": "unheard_of"}', '{"model_type": "vit"}'])
def test_a_config_that_is_no_known_language_model_has_no_family(
    tmp_path: Path, config: str
) -> None:
    assert read_family(tmp_path) is None
    (tmp_path / "config.json").write_text(config)
    assert read_family(tmp_path) is None


@pytest.mark.parametrize(
    ("kind", "stored", "written"),
    [
        ("gpt2", "h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("gpt2", "transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.weight"),
        ("gpt2", "h.0.attn.bias", "h.0.attn.bias"),
        ("bloom", "word_embeddings.weight", "transformer.word_embeddings.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        (
            "qwen3_moe",
            "layers.0.mlp.experts.1.up_proj.weight",
            "model.layers.0.mlp.experts.1.up_proj.weight",
        ),
        ("mixtral", *["model.layers.0.block_sparse_moe.experts.1.w2.weight"] * 2),
        ("gpt_neox", *["embed_out.weight"] * 2),
        ("llava", *["language_model.model.layers.0.mlp.up_proj.weight"] * 2),
    ],
)
def test_files_without_the_base_prefix_have_the_names_that_transformers_writes(
    tmp_path: Path, kind: str, stored: str, written: str
) -> None:
    assert family(tmp_path, kind).with_prefix(stored) == written
