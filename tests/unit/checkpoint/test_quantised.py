"""FP8 weights are read as transformers dequantises them; every other quantised format is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opd.checkpoint.tensors import open_checkpoint
from tests.unit.checkpoint.models import Tensors, configured, written

NAME = "model.layers.0.mlp.down_proj.weight"


def codes(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 codes and scales of blocks of rows x columns, the last ones cut short."""
    m, n = weight.shape
    grid = torch.zeros(-(-m // rows), -(-n // columns))
    quantised = torch.zeros_like(weight)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            grid[i, j] = weight[block].abs().max() / 448
            quantised[block] = weight[block] / grid[i, j]
    return quantised.to(torch.float8_e4m3fn), grid


def opened(folder: Path, tensors: Tensors, **config: Any) -> Tensors:
    configured(folder, **config)
    written(folder, tensors)
    return {name: stored.read() for name, stored in open_checkpoint(str(folder)).items()}


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((8, 12), (4, 4)),
        ((10, 13), (4, 8)),
        ((8, 12), (8, 12)),
        ((8, 12), (1, 12)),
        ((8, 12), (2, 3)),
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_fp8_weights_are_codes_times_scales(
    tmp_path: Path, suffix: str, shape: tuple[int, int], block: tuple[int, int], dtype: str
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    quantised, grid = codes(weight, *block)
    stored = {
        NAME: quantised,
        NAME + suffix: grid,
        NAME.replace("weight", "input_scale"): torch.ones(()),
        "model.norm.weight": torch.ones(4).bfloat16(),
    }
    settings = {"quant_method": "fp8", "weight_block_size": list(block)}
    found = opened(tmp_path, stored, quantization_config=settings, dtype=dtype)
    assert set(found) == {NAME, "model.norm.weight"}
    assert found[NAME].dtype == getattr(torch, dtype)
    assert (found[NAME].float() - weight).abs().max() < 0.05 * weight.abs().max()
    row, column = shape[0] - 1, shape[1] - 1
    expected = quantised[row, column].float() * grid[row // block[0], column // block[1]]
    assert found[NAME][row, column] == expected.to(found[NAME].dtype)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (8, 1), (1, 1)])
def test_fp8_scales_may_be_of_the_tensor_or_of_its_rows(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    quantised, scale = torch.randn(8, 12).to(torch.float8_e4m3fn), torch.rand(shape)
    found = opened(
        tmp_path, {NAME: quantised, NAME + "_scale": scale}, quantization_config={"a": 1}
    )
    wide = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(1, 1)
    assert torch.equal(found[NAME], (quantised.float() * wide).bfloat16())


def test_stacked_experts_in_fp8_are_dequantised_one_by_one(tmp_path: Path) -> None:
    weight = torch.randn(3, 8, 12)
    parts = [codes(expert, 4, 4) for expert in weight]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = {
        name: torch.stack([p[0] for p in parts]),
        name + "_scale_inv": torch.stack([p[1] for p in parts]),
    }
    found = opened(tmp_path, stored, quantization_config={"weight_block_size": [4, 4]})
    assert list(found) == [name]
    assert (found[name].float() - weight).abs().max() < 0.2


def test_bytes_are_exponents_of_scales(tmp_path: Path) -> None:
    quantised = torch.randn(8, 64).to(torch.float8_e4m3fn)
    exponents = torch.randint(120, 130, (8, 2)).to(torch.uint8)
    found = opened(
        tmp_path, {NAME: quantised, NAME + "_scale": exponents}, quantization_config={"a": 1}
    )
    scale = (exponents.float() - 127).exp2().repeat_interleave(32, 1)
    assert torch.equal(found[NAME], (quantised.float() * scale).bfloat16())


def test_our_dequantisation_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = torch.randn(256, 384)
    quantised, grid = codes(weight, 128, 128)
    theirs = Fp8Dequantize(None)._dequantize_one(quantised, grid, torch.bfloat16)
    found = opened(
        tmp_path,
        {NAME: quantised, NAME + "_scale_inv": grid},
        quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]},
    )
    assert torch.equal(found[NAME], theirs)


def test_fp8_without_scales_is_the_weight_itself_unless_the_config_says_quantised(
    tmp_path: Path,
) -> None:
    quantised = torch.randn(8, 12).to(torch.float8_e5m2)
    found = opened(tmp_path, {NAME: quantised})
    assert torch.equal(found[NAME].float(), quantised.float())
    configured(tmp_path, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="stored in FP8 without a"):
        open_checkpoint(str(tmp_path))


def test_scales_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    quantised = torch.randn(8, 12).to(torch.float8_e4m3fn)
    stored = {NAME: quantised, NAME + "_scale_inv": torch.rand(3, 5)}
    with pytest.raises(ValueError, match=r"the scales \[3, 5\] of .* \[8, 12\] fit neither"):
        opened(tmp_path, stored, quantization_config={"weight_block_size": [4, 4]})


STEM = "model.layers.0.self_attn.q_proj"
INTEGERS = torch.ones(4, 4, dtype=torch.int32)
QUANTISED: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "gptq": (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {
            f"{STEM}.qweight": INTEGERS,
            f"{STEM}.qzeros": INTEGERS,
            f"{STEM}.scales": torch.ones(4, 4),
        },
        "gptq",
    ),
    "awq, silent": ({}, {f"{STEM}.qweight": INTEGERS}, "GPTQ or AWQ"),
    "mlx": (
        {"quantization": {"group_size": 64, "bits": 4}},
        {f"{STEM}.weight": INTEGERS.to(torch.uint32), f"{STEM}.scales": torch.ones(4, 1)},
        "MLX",
    ),
    "bitsandbytes, 4 bits": (
        {},
        {f"{STEM}.weight": torch.ones(8, 1).byte(), f"{STEM}.weight.absmax": torch.ones(2)},
        "bitsandbytes|codes",
    ),
    "bitsandbytes, 8 bits": (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {f"{STEM}.weight": torch.ones(4, 4).char(), f"{STEM}.SCB": torch.ones(4)},
        "bitsandbytes",
    ),
    "compressed-tensors": (
        {"quantization_config": {"quant_method": "compressed-tensors"}},
        {f"{STEM}.weight_packed": INTEGERS, f"{STEM}.weight_scale": torch.ones(4, 1)},
        "compressed-tensors",
    ),
    "mxfp4": (
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"model.layers.0.mlp.experts.down_proj_blocks": torch.ones(2, 4, 4).byte()},
        "mxfp4",
    ),
    "int8 of the text model": (
        {"text_config": {"quantization_config": {"quant_method": "quanto"}}},
        {f"{STEM}.weight": torch.ones(4, 4).char()},
        "quanto",
    ),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_other_quantised_formats_are_refused_by_their_name(tmp_path: Path, case: str) -> None:
    config, tensors, words = QUANTISED[case]
    with pytest.raises(ValueError, match=rf"is quantised \(({words}).*give the model it was"):
        opened(tmp_path, tensors, **config)


def test_integer_buffers_are_no_codes(tmp_path: Path) -> None:
    stored = {"model.position_ids": torch.arange(4)[None], "model.counts.weight": torch.arange(3)}
    assert set(opened(tmp_path, stored)) == set(stored)
