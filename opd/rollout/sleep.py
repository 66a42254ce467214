"""What of an engine's memory is on the GPU: it sleeps while teacher and learner work."""

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm import LLM


class SleepLevel(IntEnum):
    """What a sleeping engine does with its weights; the numbers are vLLM's. Its cache is freed by both."""

    keep_weights = 1
    """Copy them to the host's memory and back."""
    discard_weights = 2
    """Free them: the engine generates only after the next push."""


class EngineSleep:
    """Frees the memory of an engine in this process, and brings back what the next call needs.

    A push needs the weights, ``generate`` also the key-value cache. Weights that were discarded come
    back as NaN, so that a tensor that a push does not reach is seen in the first log-prob. Where
    ``enabled`` is false the engine is always awake.

    What vLLM does, on which this relies: sleep drops the prefix cache. Tensors keep their addresses,
    so that captured graphs stay valid. Level 2 copies buffers to the host, and waking the weights
    copies them back. A reload writes into the storage that a layer already has, packed as the platform
    packs it; layers that a push does not reach keep what is there.
    """

    def __init__(self, llm: "LLM", *, enabled: bool) -> None:
        self._llm = llm
        self._enabled = enabled
        self._asleep: set[str] = set()
        self._has_weights = True

    def sleep(self, level: SleepLevel) -> None:
        """Free weights and cache of an engine that is awake."""
        if not self._enabled:
            return
        assert "weights" not in self._asleep, "vLLM would ignore the second level"
        self._llm.sleep(level=int(level))
        self._has_weights = level == SleepLevel.keep_weights
        self._asleep = {"weights", "kv_cache"}

    def wake_for_push(self) -> None:
        """Bring the weights back to the GPU, to be written over."""
        if self._wake("weights") and not self._has_weights:
            self._llm.collective_rpc(_fill_with_nan)

    def pushed(self) -> None:
        """The engine has the weights of a whole push."""
        self._has_weights = True

    def wake_for_generate(self) -> None:
        """Bring weights and cache back to the GPU.

        AssertionError when the weights were discarded and none have been pushed since.
        """
        self._require_weights()
        self._wake("weights")
        self._wake("kv_cache")

    def _wake(self, tag: str) -> bool:
        """Whether ``tag`` was asleep."""
        if tag not in self._asleep:
            return False
        self._llm.wake_up(tags=[tag])
        self._asleep.discard(tag)
        return True

    def _require_weights(self) -> None:
        assert self._has_weights, (
            "the engine's weights were discarded (sleep level 2) and none were pushed since"
        )


def _fill_with_nan(worker: Any) -> None:
    """Every parameter of a worker's model whose dtype has a NaN."""
    with torch.no_grad():
        for parameter in worker.get_model().parameters():
            if parameter.dtype in (torch.float32, torch.bfloat16, torch.float16):
                parameter.fill_(float("nan"))
