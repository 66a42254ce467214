"""``student``: the model that writes and learns. Also the number formats that settings name."""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The model that writes and learns."""

    model: str = MISSING
    """Folder or hub id of a causal language model."""
    trust_remote_code: bool = False
    """Run code that comes with the model; off unless you ask for it."""
    attn_implementation: str = "sdpa"
    """Attention implementation of transformers: sdpa, eager, flash_attention_2."""
