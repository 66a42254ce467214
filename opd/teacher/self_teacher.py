"""The student as its own teacher: a module in this process, frozen, averaged, or with adapters off."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from opd.head import HeadSpec
from opd.model_head import decoder
from opd.teacher.backend_torch import hidden_states
from opd.types import IntArray, TeacherInfo

ForwardContext = Callable[[], AbstractContextManager[Any]]


class ModuleBackend:
    """A ``Backend`` over a live transformers model, whose weights may change between calls.

    ``model`` is the causal language model. ``forward_context`` makes the context of each forward pass,
    for example peft's ``disable_adapter``.
    """

    def __init__(
        self,
        model: Any,
        *,
        info: TeacherInfo,
        spec: HeadSpec,
        max_tokens: int,
        forward_context: ForwardContext = nullcontext,
    ) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._forward_context = forward_context
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
            with self._forward_context():
                return hidden_states(decoder(model), sequences, self._max_tokens)
        finally:
            model.train(was_training)
