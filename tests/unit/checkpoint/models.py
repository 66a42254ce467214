"""Tiny models of transformers in folders, and what transformers loads from them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]
SIZE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def saved(kind: str, folder: Path, **settings: Any) -> Tensors:
    """A tiny random model of a family in ``folder``; returns the tensors of its file."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**(SIZE | settings)))
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def written(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> Path:
    """Write tensors into a file of a folder, in the format of its ending."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    if file.endswith(".bin"):
        torch.save(copies, folder / file)
    else:
        save_file(copies, folder / file, {"format": "pt"})
    return folder


def indexed(folder: Path, weight_map: dict[str, str], file: str) -> None:
    """Write an index of shards."""
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def configured(folder: Path, **changes: Any) -> None:
    """Change settings of a config.json; None removes one."""
    file = folder / "config.json"
    config = (json.loads(file.read_text()) if file.exists() else {}) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def loaded(folder: Path) -> AutoModelForCausalLM:
    """The model that transformers loads."""
    return AutoModelForCausalLM.from_pretrained(folder)
