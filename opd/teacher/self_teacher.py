"""The student as its own teacher: a module of this process, frozen, averaged, or with adapters off."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from opd.head import HeadSpec
from opd.teacher.backend_torch import hidden_states
from opd.types import IntArray, TeacherInfo

Around = Callable[[], AbstractContextManager[Any]]


class ModuleBackend:
    """A ``Backend`` over a live transformers model, whose weights others may move between calls.

    ``model`` is the causal language model; ``around`` wraps each forward pass, for example peft's ``disable_adapter``.
    """

    def __init__(
        self,
        model: Any,
        *,
        info: TeacherInfo,
        spec: HeadSpec,
        max_tokens: int,
        around: Around = nullcontext,
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._around = around
        self.info = info
        self.spec = spec

    @property
    def head_VD(self) -> torch.Tensor:
        """The output head as it is now, float32."""
        return self._model.get_output_embeddings().weight.detach().float()

    @torch.no_grad()
    def hidden(self, sequences: Sequence[IntArray]) -> list[torch.Tensor]:
        """See ``Backend``; the tensors lie on the model's device."""
        model = self._model
        was_training = model.training
        model.eval()
        try:
            with self._around():
                return hidden_states(model.base_model, sequences, self._max_tokens)
        finally:
            model.train(was_training)
