"""Weights into a rollout engine of this process, after every step."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from opd.interfaces import Weights
from opd.sync.reload import reload

if TYPE_CHECKING:
    from vllm import LLM


class VllmWeights:
    """Implements ``WeightSync`` for a vLLM engine in this process: live tensors, without a copy.

    Goes through the worker's own reload, which repacks what the platform packs after loading (linear
    layers on CPU). ``wake`` wakes a sleeping engine; ``mark`` sets the version of its rollouts.
    """

    def __init__(
        self, llm: "LLM", *, wake: Callable[[], None], mark: Callable[[int], None]
    ) -> None:
        self._llm = llm
        self._wake = wake
        self._mark = mark
        self._observes = True

    def push(self, weights: Weights, version: int) -> dict[str, float]:
        self._wake()
        stream = _CountedWeights(weights)
        found = self._llm.collective_rpc(
            reload, kwargs={"weights": iter(stream), "observe": self._observes}
        )
        self._observes = any(found)
        self._llm.collective_rpc(_repack_tied_head)
        assert stream.exhausted, "the engine stopped reading before the last weight"
        self._llm.reset_prefix_cache()
        self._mark(version)
        return {"sync/bytes": float(stream.bytes)}


def _repack_tied_head(worker: Any) -> None:
    """Pack the output head anew: one tied to the embedding keeps its old packed copy through a reload.

    Without this the engine samples from a mixture of two versions, without any error.
    """
    model = worker.get_model()
    config = worker.model_runner.model_config.hf_text_config
    if config.tie_word_embeddings:
        head = getattr(model, "lm_head", None)  # Gemma 2 and Cohere use the embedding itself
        if head is not None:
            head.quant_method.process_weights_after_loading(head)


class ModuleWeights:
    """Implements ``WeightSync`` for a transformers module: copies by name, in place.

    ``tensors`` are the module's own, under the names that the learner hands over.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, mark: Callable[[int], None]) -> None:
        self._tensors = tensors
        self._mark = mark

    def push(self, weights: Weights, version: int) -> dict[str, float]:
        stream = _CountedWeights(weights)
        missing = set(self._tensors)
        with torch.no_grad():
            for name, tensor in stream:
                self._tensors[name].copy_(tensor)
                missing.discard(name)
        assert not missing, f"the learner handed over no {sorted(missing)[0]}"
        self._mark(version)
        return {"sync/bytes": float(stream.bytes)}


class _CountedWeights:
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
