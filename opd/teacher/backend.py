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


class ServerBackend(Backend, Protocol):
    """A back end of a server, which can leave its device to others while nobody needs it.

    Between ``sleep`` and ``wake`` neither ``hidden`` nor ``head_VD`` is used. Neither is called twice in a
    row, and ``sleep`` only where ``TeacherEngineConfig.sleep`` is set.
    """

    def sleep(self) -> None:
        """Move weights and head to host memory, and free the device's."""
        ...

    def wake(self) -> None:
        """Bring them back; everything is computed as before."""
        ...
