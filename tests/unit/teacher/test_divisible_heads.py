"""A teacher's heads divide over its GPUs, or the sizes that do are named."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from opd.teacher.model_info import require_divisible_heads


@pytest.mark.parametrize(
    ("heads", "groups", "width", "size", "allowed"),
    [
        (28, 4, 18944, 8, "1, 2, 4"),  # Qwen2.5-7B
        (12, 2, 8960, 8, "1, 2, 4"),  # DeepScaleR-1.5B
        (40, 8, 17408, 3, "1, 2, 4, 8"),  # Qwen3-14B
        (9, 3, 1536, 9, "1, 3"),  # SmolLM2-135M: vLLM cannot divide the MLP by 9
    ],
)
def test_sizes_that_do_not_divide_are_refused_with_those_that_do(
    tmp_path: Path, heads: int, groups: int, width: int, size: int, allowed: str
) -> None:
    sizes = {"num_attention_heads": heads, "num_key_value_heads": groups, "hidden_size": 8 * heads}
    LlamaConfig(**sizes, intermediate_size=width).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"does not divide the {heads} .* allowed are {allowed}$"):
        require_divisible_heads(str(tmp_path), size)
    for good in map(int, allowed.split(", ")):
        require_divisible_heads(str(tmp_path), good)
