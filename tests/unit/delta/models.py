"""Tiny models before and after training, as folders, and the sparse checkpoint between them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from opd.checkpoint.tensors import open_checkpoint
from opd.delta.export import export_delta
from opd.delta.format import Delta
from opd.delta.rebuild import write_base, write_trained

Weights = dict[str, torch.Tensor]
Folder = Callable[..., Path]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = [torch.bfloat16, torch.float32]


def write_folder(path: Path, weights: Weights, **config: object) -> Path:
    """A model folder of these weights, with companions."""
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({"model_type": "made", **config}))
    (path / "tokenizer.json").write_text('{"made": 1}')
    return path


def weights(dtype: torch.dtype) -> Weights:
    """A matrix, a vector, a scalar, nothing, integers, and an odd number of bytes."""
    torch.manual_seed(0)
    return {
        EMBEDDING: torch.randn(9, 5).to(dtype),
        "model.layers.0.q.weight": torch.randn(8, 6).to(dtype),
        "model.norm.weight": torch.randn(7).to(dtype),
        "model.scale": torch.tensor(1.5).to(dtype),
        "model.none": torch.zeros(0, 3).to(dtype),
        "model.steps": torch.arange(3),
        "model.flags": torch.tensor([1, 2, 3], dtype=torch.uint8),
    }


def touched(before: Weights, *names: str) -> Weights:
    """A copy with every third element of the named tensors changed (of all, unless named)."""
    after = {name: tensor.clone() for name, tensor in before.items()}
    for name in names or after:
        after[name].view(-1)[::3] += 1
    return after


def same_bits(ours: Weights, theirs: Weights) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[n].dtype == theirs[n].dtype
        and ours[n].shape == theirs[n].shape
        and torch.equal(bits(ours[n]), bits(theirs[n]))
        for n in ours
    )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(INTEGERS[tensor.element_size()])


def exported(base: Path, trained: Path) -> Delta:
    return export_delta(
        open_checkpoint(str(base)), open_checkpoint(str(trained)), base.parent / "d.safetensors"
    )


def both_ways(base: Path, trained: Path) -> Delta:
    """Export, apply, undo; the folders hold the bits of trained and base."""
    delta = exported(base, trained)
    made, back = base.parent / "made", base.parent / "back"
    write_trained(open_checkpoint(str(base)), delta, made)
    write_base(open_checkpoint(str(trained)), delta, back)
    for ours, theirs in ((made, trained), (back, base)):
        found, expected = open_checkpoint(str(ours)), open_checkpoint(str(theirs))
        assert same_bits(
            {n: s.read() for n, s in found.items()}, {n: s.read() for n, s in expected.items()}
        )
    return delta
