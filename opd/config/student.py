"""``student``: the model that generates and learns. Also the number formats of settings."""

from dataclasses import dataclass
from enum import StrEnum

from omegaconf import MISSING


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


AUTO_ATTENTION = "auto"


@dataclass(kw_only=True, slots=True)
class StudentConfig:
    """The model that generates and learns."""

    model: str = MISSING
    """Folder or Hub id of a causal language model; name@revision fixes a commit, tag or branch."""
    trust_remote_code: bool = False
    """Execute code that comes with the model."""
    attn_implementation: str = AUTO_ATTENTION
    """sdpa, eager, flash_attention_2, ...; auto: the model's default, or eager where the two differ."""
