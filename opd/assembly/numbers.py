"""Number formats."""

from typing import TYPE_CHECKING

from opd.config.schema import Config
from opd.config.models import DType
from opd.config.training import Precision

if TYPE_CHECKING:
    import torch


def compute_dtype(config: Config) -> "torch.dtype":
    """The number format of the learner's products, and of the engine unless it is told another."""
    import torch

    return torch.float32 if config.train.precision == Precision.fp32 else torch.bfloat16


def torch_dtype(dtype: DType) -> "torch.dtype":
    """DType.bfloat16 -> torch.bfloat16"""
    import torch

    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}[dtype]
