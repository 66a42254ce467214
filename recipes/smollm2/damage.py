"""Damage a model as compression would damage it, and save it as a plain Hugging Face folder.

    python recipes/smollm2/damage.py --model TEACHER --out STUDENT --noise 0.10 --seed 0
    python recipes/smollm2/damage.py --model TEACHER --out STUDENT --drop-layers 13 14
    python recipes/smollm2/damage.py --model TEACHER --out STUDENT --quantize 5

There are three kinds of damage. Noise and rounding are applied to the matrices of the layers. Norms,
embedding and head are not changed, as quantisers usually leave them unchanged: the row of a token
that never occurs in training could not recover.

- ``--noise S``: ``W + S * rms(W) * N(0, 1)``, the root mean square taken over each matrix. Rounding
  to b bits adds an error of this kind.
- ``--drop-layers I ...``: depth pruning; the layers with these numbers (from 0) are removed.
- ``--quantize B``: each output row is rounded to the nearest of ``2**B - 1`` evenly spaced levels,
  symmetric about zero, and stored as the rounded value (no packed format).

The same model, kind and seed give the same file, byte for byte.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging


def with_noise(weight: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise whose size is ``scale`` times the matrix's own root mean square."""
    noise = torch.randn(weight.shape, generator=generator)
    return weight + scale * weight.square().mean().sqrt() * noise


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Round to nearest on a symmetric grid, one scale for each row."""
    largest = 2 ** (bits - 1) - 1
    step = weight.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / largest
    return (weight / step).round() * step


def drop_layers(model: PreTrainedModel, dropped: set[int]) -> None:
    """Remove decoder layers and renumber the rest, so that the saved folder loads by itself."""
    layers = model.model.layers
    missing = sorted(i for i in dropped if not 0 <= i < len(layers))
    if missing:
        raise SystemExit(f"--drop-layers {missing}: the model has layers 0 to {len(layers) - 1}")
    kept = [layer for i, layer in enumerate(layers) if i not in dropped]
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    layer_types = model.config.to_dict().get("layer_types")
    if layer_types:
        model.config.layer_types = [t for i, t in enumerate(layer_types) if i not in dropped]


@torch.no_grad()
def damage(model: PreTrainedModel, args: argparse.Namespace) -> None:
    """Apply the one chosen kind in place, computing in float32 whatever the storage type."""
    if args.drop_layers:
        drop_layers(model, set(args.drop_layers))
        return
    generator = torch.Generator().manual_seed(args.seed)
    for parameter in model.model.layers.parameters():
        if parameter.ndim < 2:
            continue
        weight = parameter.float()
        if args.noise is not None:
            weight = with_noise(weight, args.noise, generator)
        else:
            weight = rounded(weight, args.quantize)
        parameter.copy_(weight)


def main() -> None:
    """Read the command line, damage, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True, help="the undamaged model: a folder or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--noise", type=float, help="relative size of the noise; training can repair 0.10"
    )
    kind.add_argument("--drop-layers", type=int, nargs="+", metavar="I", help="layers to remove")
    kind.add_argument("--quantize", type=int, metavar="BITS", help="bits per weight, 2 to 8")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the noise (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.noise is not None and args.noise <= 0:
        parser.error(f"--noise {args.noise}: give a number above 0")
    if args.quantize is not None and not 2 <= args.quantize <= 8:
        parser.error(f"--quantize {args.quantize}: give 2 to 8 bits")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    damage(model, args)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{args.out}: saved, {model.config.num_hidden_layers} layers, {model.dtype}")


if __name__ == "__main__":
    main()
