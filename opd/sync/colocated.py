"""Weights into a rollout engine of this process, after every step."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from opd.interfaces import Weights

if TYPE_CHECKING:
    from vllm import LLM


class VllmWeights:
    """Implements ``WeightSync`` for a vLLM engine in this process: live tensors, no copy on the way.

    Goes through the worker's own reload, which repacks what the platform packs after loading (linear
    layers on CPU). Args: ``wake`` brings a sleeping engine back; ``mark`` tells it the version.
    """

    def __init__(
        self, llm: "LLM", *, wake: Callable[[], None], mark: Callable[[int], None]
    ) -> None:
        self._llm = llm
        self._wake = wake
        self._mark = mark

    def push(self, weights: Weights, version: int) -> dict[str, float]:
        self._wake()
        counted = _Counted(weights)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(counted)})
        self._llm.collective_rpc(_repack_tied_head)
        assert counted.exhausted, "the engine stopped reading before the last weight"
        self._llm.reset_prefix_cache()
        self._mark(version)
        return {"sync/bytes": float(counted.bytes)}


def _repack_tied_head(worker: Any) -> None:
    """A head tied to the embedding keeps its old packed copy through a reload; pack it anew.

    Without this the engine samples from a mixture of two versions, with no error anywhere.
    """
    model = worker.get_model()
    config = worker.model_runner.model_config.hf_text_config
    if config.tie_word_embeddings:
        head = model.lm_head
        head.quant_method.process_weights_after_loading(head)


class ModuleWeights:
    """Implements ``WeightSync`` for a transformers module: copies by name, in place."""

    def __init__(self, module: torch.nn.Module, *, mark: Callable[[int], None]) -> None:
        self._parameters = dict(module.named_parameters())
        self._mark = mark

    def push(self, weights: Weights, version: int) -> dict[str, float]:
        counted = _Counted(weights)
        missing = set(self._parameters)
        with torch.no_grad():
            for name, tensor in counted:
                self._parameters[name].copy_(tensor)
                missing.discard(name)
        assert not missing, f"the learner handed over no {sorted(missing)[0]}"
        self._mark(version)
        return {"sync/bytes": float(counted.bytes)}


class _Counted:
    """An iterable of weights that counts bytes and knows whether it was read to the end."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.bytes = 0
        self.exhausted = False

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor
        self.exhausted = True
