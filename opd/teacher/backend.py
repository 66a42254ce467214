"""The seam behind every teacher: what computes hidden states, vLLM or a Hugging Face model."""

from collections.abc import Sequence
from typing import Protocol

import torch

from opd.head import HeadSpec
from opd.types import IntArray, TeacherInfo


class Backend(Protocol):
    """A causal model without its output head, which is applied apart."""

    info: TeacherInfo
    spec: HeadSpec

    @property
    def head_VD(self) -> torch.Tensor:
        """The output head [V, D]."""
        ...

    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """The final-norm hidden states [L, D] float32 of each sequence, every position of it."""
        ...
