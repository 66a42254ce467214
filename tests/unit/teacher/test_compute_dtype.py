"""teacher.dtype=auto computes in the checkpoint's own number format, whatever vLLM's auto would do."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from opd.config.student import DType
from opd.teacher.backend_vllm import compute_dtype
from opd.teacher.model_info import read_dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_format_in_the_config(tmp_path: Path, dtype: torch.dtype) -> None:
    Qwen3Config(dtype=dtype).save_pretrained(tmp_path)
    assert read_dtype(str(tmp_path)) == dtype
    assert compute_dtype(str(tmp_path), DType.auto) == str(dtype).removeprefix("torch.")


def test_a_config_without_a_format_is_float32(tmp_path: Path) -> None:
    Qwen3Config().save_pretrained(tmp_path)
    assert compute_dtype(str(tmp_path), DType.auto) == "float32"


def test_a_format_that_is_set_is_used(tmp_path: Path) -> None:
    Qwen3Config(dtype=torch.float32).save_pretrained(tmp_path)
    assert compute_dtype(str(tmp_path), DType.bfloat16) == "bfloat16"
