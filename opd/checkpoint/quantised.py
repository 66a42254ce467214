"""Weights of quantised checkpoints: FP8 with scales is dequantised, every other format is refused.

Codes are no weights: compared, ranked or subtracted as numbers they give figures that mean nothing.
"""

from collections.abc import Mapping
from typing import Any

import torch

from opd.checkpoint.stored import Stored

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
QUANTISATION = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json that describe a quantised model."""
_SCALES = ("_scale_inv", "_scale")
"""Suffixes of an FP8 tensor's scales; a weight is its code times the scale, whatever the suffix."""
_BESIDE = ("weight_scale_inv", "weight_scale", "input_scale", "activation_scale", "output_scale")
"""Tensors of an FP8 layer that are no weights."""
_SIGNS = (
    (".qweight", "GPTQ or AWQ"),
    (".qzeros", "GPTQ or AWQ"),
    ("_packed", "packed integers"),
    ("_blocks", "MXFP4"),
    (".W_q", "HQQ"),
)
"""Endings of names that only quantised layers have, and the format that they belong to."""

_SIBLINGS = (("weight.absmax", "bitsandbytes"), ("SCB", "bitsandbytes"), ("scales", "MLX"))
"""Tensors beside a ``weight`` of integer codes, and the format that they belong to."""


def plain_tensors(
    tensors: Mapping[str, Stored], config: Mapping[str, Any], model: str
) -> dict[str, Stored]:
    """The tensors with FP8 weights dequantised and their scales left out; others as they are.

    Dequantised weights are in the number format of the config, bfloat16 without one, as transformers
    loads them. ``config`` is the model's config.json. Raises ValueError for other quantised formats.
    """
    settings = _settings(config)
    for name, stored in tensors.items():
        found = _integer_format(name, stored, tensors)
        if found:
            raise ValueError(_refusal(model, str(settings.get("quant_method") or found), name))
    plain: dict[str, Stored] = dict(tensors)
    for name, stored in tensors.items():
        if stored.dtype not in FP8:
            continue
        scale = next((tensors[name + end] for end in _SCALES if name + end in tensors), None)
        if scale is None and settings:
            raise ValueError(
                f"{name} of {model} is stored in FP8 without a {name}_scale_inv or {name}_scale: "
                "give the model it was quantised from"
            )
        plain[name] = _dequantised(name, stored, scale, config, settings)
        if scale is not None:
            stem = name.removesuffix("weight") if name.endswith("weight") else None
            beside = [name + end for end in _SCALES]
            beside += [] if stem is None else [stem + leaf for leaf in _BESIDE]
            for other in beside:
                plain.pop(other, None)
    return plain


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The quantization settings of a config.json, of the text model's where the outer has none."""
    for place in (config, config.get("text_config") or {}):
        for key in QUANTISATION:
            if isinstance(place.get(key), dict) and place[key]:
                return place[key]
    return {}


def _integer_format(name: str, stored: Stored, tensors: Mapping[str, Stored]) -> str:
    """The format of a tensor of integer codes; empty for tensors that are none."""
    if stored.dtype.is_floating_point or stored.dtype.is_complex:
        return ""
    for ending, found in _SIGNS:
        if name.endswith(ending):
            return found
    if name.endswith(".weight") and len(stored.shape) > 1:
        stem = name.removesuffix("weight")
        for sibling, found in _SIBLINGS:
            if stem + sibling in tensors:
                return found
        return f"{str(stored.dtype).removeprefix('torch.')} codes"
    return ""


def _refusal(model: str, found: str, name: str) -> str:
    return (
        f"{model} is quantised ({found}: {name} holds codes, not weights), and opd reads plain weights "
        "and FP8 only: give the model it was quantised from, or dequantise it first"
    )


def _dequantised(
    name: str,
    stored: Stored,
    scale: Stored | None,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Stored:
    """A tensor of FP8 numbers as weights; without a scale they are the weights themselves."""
    if scale is None:
        return Stored(
            shape=stored.shape, dtype=torch.bfloat16, read=lambda: stored.read().bfloat16()
        )
    dtype = _dtype(config)
    blocks = _blocks(name, stored, scale, settings)

    def read() -> torch.Tensor:
        codes, factors = stored.read().float(), _factors(scale.read())
        if blocks is None:
            return (codes * factors.reshape(-1)[0]).to(dtype)
        if factors.dim() == 1:
            factors = factors[:, None]
        for dim, size in zip((-2, -1), blocks, strict=True):
            factors = factors.repeat_interleave(size, dim).narrow(dim, 0, codes.shape[dim])
        return (codes * factors).to(dtype)

    return Stored(shape=stored.shape, dtype=dtype, read=read)


def _factors(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float32; a byte is an exponent (E8M0)."""
    if scale.dtype == torch.uint8:
        return (scale.float() - 127).exp2()
    return scale.float()


def _blocks(
    name: str, stored: Stored, scale: Stored, settings: Mapping[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None when all do. ValueError when the sizes do not fit."""
    if scale.numel == 1:
        return None
    grid = scale.shape if len(scale.shape) > 1 else (*scale.shape, 1)
    if len(stored.shape) == len(grid) and stored.shape[:-2] == grid[:-2]:
        sizes = stored.shape[-2:]
        declared = settings.get("weight_block_size") or (0, 0)
        whole = [
            size // n if n and size % n == 0 else 0
            for size, n in zip(sizes, grid[-2:], strict=True)
        ]
        for blocks in (tuple(declared), tuple(whole)):
            if all(blocks) and all(
                -(-size // block) == n
                for size, block, n in zip(sizes, blocks, grid[-2:], strict=True)
            ):
                return int(blocks[0]), int(blocks[1])
    raise ValueError(
        f"the scales {list(scale.shape)} of {name} {list(stored.shape)} fit neither a block size that "
        "config.json declares nor equal blocks: give the model it was quantised from"
    )


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The number format that a config names; bfloat16 without one."""
    text = config.get("text_config") or {}
    named = [place.get(key) for place in (config, text) for key in ("dtype", "torch_dtype")]
    formats = {"float32": torch.float32, "float16": torch.float16}
    return next((formats.get(str(n), torch.bfloat16) for n in named if n), torch.bfloat16)
