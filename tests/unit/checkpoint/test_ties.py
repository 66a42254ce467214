"""A head that transformers ties to the embedding is no tensor of its own."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.checkpoint.tensors import open_checkpoint
from tests.unit.checkpoint.models import Tensors, configured, loaded, saved, written

HEAD = "lm_head.weight"
TIED: list[tuple[str, str, dict[str, Any]]] = [
    ("gemma3_text", "model.embed_tokens.weight", {}),
    ("llama", "model.embed_tokens.weight", {"tie_word_embeddings": True}),
    ("gpt2", "transformer.wte.weight", {"n_embd": 16, "n_head": 2, "n_layer": 1}),
    ("bloom", "transformer.word_embeddings.weight", {"n_head": 2, "n_layer": 1}),
    ("gpt_neox", "gpt_neox.embed_in.weight", {"tie_word_embeddings": True}),
]


def read(folder: Path) -> Tensors:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return {name: stored.read() for name, stored in open_checkpoint(str(folder)).items()}


def silent(kind: str, folder: Path, settings: dict[str, Any]) -> Tensors:
    """A tied model whose config.json does not say so where that is the default of its family."""
    tensors = saved(kind, folder, **settings)
    if "tie_word_embeddings" not in settings:
        configured(folder, tie_word_embeddings=None)
    return tensors


@pytest.mark.parametrize(("kind", "embedding", "settings"), TIED)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_head_that_repeats_the_embedding_counts_once(
    tmp_path: Path, kind: str, embedding: str, settings: dict[str, Any], file: str
) -> None:
    tensors = silent(kind, tmp_path, settings)
    assert embedding in tensors
    (tmp_path / "model.safetensors").unlink()
    head = "embed_out.weight" if kind == "gpt_neox" else HEAD
    written(tmp_path, tensors | {head: tensors[embedding]}, file)
    assert set(read(tmp_path)) == set(tensors)


@pytest.mark.parametrize(("kind", "embedding", "settings"), TIED)
def test_a_head_with_other_values_is_kept_as_transformers_keeps_it(
    tmp_path: Path, kind: str, embedding: str, settings: dict[str, Any]
) -> None:
    tensors = silent(kind, tmp_path, settings)
    head = "embed_out.weight" if kind == "gpt_neox" else HEAD
    tensors[head] = tensors[embedding] + 1
    written(tmp_path, tensors)
    with pytest.warns(UserWarning, match="stores both with different values"):
        found = open_checkpoint(str(tmp_path))
    model: Any = loaded(tmp_path)
    assert torch.equal(found[head].read(), model.get_output_embeddings().weight)
    assert torch.equal(found[embedding].read(), model.get_input_embeddings().weight)


@pytest.mark.parametrize(("kind", "embedding", "settings"), TIED)
def test_a_head_that_is_stored_alone_is_the_embedding(
    tmp_path: Path, kind: str, embedding: str, settings: dict[str, Any]
) -> None:
    tensors = silent(kind, tmp_path, settings)
    head = "embed_out.weight" if kind == "gpt_neox" else HEAD
    alone = {head if name == embedding else name: tensor for name, tensor in tensors.items()}
    written(tmp_path, alone)
    found = read(tmp_path)
    assert set(found) == set(tensors)
    model: Any = loaded(tmp_path)
    assert torch.equal(found[embedding], model.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("config", "is_tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "unheard_of", "tie_word_embeddings": True}, True),
        ({"model_type": "llama"}, False),
        ({"model_type": "llama", "tie_word_embeddings": False}, False),
        ({"model_type": "gemma2"}, True),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}, True),
        ({"model_type": "qwen2_vl", "text_config": {"tie_word_embeddings": True}}, True),
        ({"model_type": "qwen3_vl", "tie_word_embeddings": True}, True),
        ({}, False),
    ],
)
@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model."])
def test_config_and_family_decide_whether_equal_tensors_are_tied(
    tmp_path: Path, config: dict[str, Any], is_tied: bool, prefix: str
) -> None:
    table = torch.randn(8, 4)
    head = "language_model.lm_head.weight" if prefix.startswith("language") else HEAD
    configured(tmp_path, **config)
    written(tmp_path, {f"{prefix}embed_tokens.weight": table, head: table})
    names = set(open_checkpoint(str(tmp_path)))
    assert (head not in names) == is_tied
