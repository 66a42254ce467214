"""Small pairs of checkpoints: normal weights and a step of a known kind."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from opd.analysis.rows import Row
from opd.analysis.walk import AnalysisInputs, measure_checkpoints

Tensors = dict[str, torch.Tensor]
SHAPES = {
    "model.embed_tokens.weight": (300, 48),
    "model.layers.0.self_attn.q_proj.weight": (48, 48),
    "model.layers.0.self_attn.k_proj.weight": (16, 48),
    "model.layers.0.mlp.gate_proj.weight": (120, 48),
    "model.layers.0.mlp.down_proj.weight": (48, 120),
    "model.layers.0.input_layernorm.weight": (48,),
    "model.layers.1.self_attn.q_proj.weight": (48, 48),
    "model.layers.1.mlp.down_proj.weight": (48, 120),
    "model.norm.weight": (48,),
}


def weights(seed: int = 0, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> Tensors:
    """Normal bf16 weights, norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=generator) * 0.03
        made[name] = (w + 1 if len(shape) == 1 else w).bfloat16()
    return made


def stepped(
    tensors: Tensors, scale: float = 3e-5, seed: int = 1, dtype: torch.dtype = torch.bfloat16
) -> Tensors:
    """After an isotropic normal step in float32."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (w.float() + scale * torch.randn(w.shape, generator=generator)).to(dtype)
        for name, w in tensors.items()
    }


def renamed(tensors: Tensors, to: Callable[[str], str]) -> Tensors:
    """The same tensors under other names."""
    return {to(name): w for name, w in tensors.items()}


def stored(folder: Path, tensors: Tensors, config: dict[str, Any] | None = None) -> str:
    """A checkpoint folder."""
    folder.mkdir(parents=True)
    save_file(
        {name: w.clone().contiguous() for name, w in tensors.items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def rows_of(folder: Path, base: Tensors, trained: Tensors, **config: Any) -> dict[str, Row]:
    """Measured rows by name."""
    a, b = stored(folder / "a", base, config), stored(folder / "b", trained, config)
    return {
        row["name"]: row
        for row in measure_checkpoints(AnalysisInputs(base=a, trained=b), folder / "out")
    }


def off_grid(tensors: Tensors) -> Tensors:
    """Float32 weights that are no bf16 numbers."""
    generator = torch.Generator().manual_seed(4)
    return {
        n: w.float() * (1 + 1e-3 * torch.rand(w.shape, generator=generator))
        for n, w in tensors.items()
    }


PAIRS = {
    "bf16": (weights(), stepped(weights())),
    "bf16, moved far": (weights(), stepped(weights(), scale=2e-3)),
    "fp32": (off_grid(weights()), stepped(off_grid(weights()), dtype=torch.float32)),
    "bf16 and fp32": (weights(), stepped(weights(), dtype=torch.float32)),
}
