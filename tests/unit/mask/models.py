"""Tiny checkpoints on disk, and ways to ask for masks of them."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from opd.checkpoint.tensors import open_checkpoint
from opd.config.mask import RuleConfig, require_valid_rule
from opd.mask.discover import Summary, discover_mask
from opd.mask.mask import Mask

SHAPES = {
    "model.embed_tokens.weight": (90, 24),
    "model.layers.0.self_attn.q_proj.weight": (24, 24),
    "model.layers.0.mlp.down_proj.weight": (24, 56),
    "model.layers.0.input_layernorm.weight": (24,),
    "model.layers.1.self_attn.q_proj.weight": (24, 24),
    "model.layers.1.mlp.down_proj.weight": (24, 56),
    "model.layers.1.input_layernorm.weight": (24,),
    "model.norm.weight": (24,),
}
NUMEL = sum(torch.Size(shape).numel() for shape in SHAPES.values())


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal bf16 weights with some exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in SHAPES.items():
        w = torch.randn(shape, generator=generator) * 0.05
        w[torch.rand(shape, generator=generator) < 0.05] = 0.0
        made[name] = w.bfloat16()
    return made


def moved(tensors: dict[str, torch.Tensor], scale: float = 1e-4) -> dict[str, torch.Tensor]:
    """The same weights after a small dense step in float32."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (w.float() + scale * torch.randn(w.shape, generator=generator)).bfloat16()
        for name, w in tensors.items()
    }


def stored(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint folder, cut into shards in a scrambled order."""
    folder.mkdir(parents=True)
    names = list(tensors)[::-1] if shards > 1 else list(tensors)
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        file = "model.safetensors" if shards == 1 else f"model-{number}.safetensors"
        save_file(part, folder / file)
    if shards > 1:
        index = {name: f"model-{n % shards}.safetensors" for n, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def discovered(base: Path, rule: RuleConfig, out: Path) -> tuple[Mask, Summary]:
    """The mask that a rule finds."""
    require_valid_rule(rule)
    like = None if rule.like is None else Mask.read(rule.like)
    summary = discover_mask(open_checkpoint(str(base)), rule, out, like=like)
    return Mask.read(out), summary


def flat(mask: Mask) -> np.ndarray:
    """One bool per weight of the model, tensors in the order of their names."""
    return np.concatenate([dense(mask, name) for name in sorted(mask.shapes)])


def dense(mask: Mask, name: str) -> np.ndarray:
    """One bool per weight of a parameter."""
    kept = np.zeros(mask.numel(name), bool)
    kept[mask.indices[name].numpy()] = True
    return kept


def joined(tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The weights themselves, in the same order, float32."""
    return np.concatenate([tensors[name].float().numpy().reshape(-1) for name in sorted(tensors)])
