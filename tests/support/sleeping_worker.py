"""A CPU worker of vLLM that sleeps as one on CUDA does, so that reading freed memory shows as NaN."""

from typing import Any

import pytest
import torch

NAN = float("nan")


def sleep(self: Any, level: int = 1) -> None:
    """Weights and cache become NaN; level 1 keeps the weights elsewhere, both levels keep the buffers."""
    tensors = dict(self.get_model().named_buffers())
    if level == 1:
        tensors |= dict(self.get_model().named_parameters())
    self.kept_asleep = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for tensor in [*_weights(self).values(), *self.model_runner.kv_caches]:
        if tensor.is_floating_point():
            tensor.fill_(NAN)


def wake_up(self: Any, tags: list[str] | None = None) -> None:
    """Kept tensors come back with the weights, the others stay NaN; the cache comes back empty."""
    if tags is None or "weights" in tags:
        for name, tensor in _weights(self).items():
            if name in self.kept_asleep:
                tensor.copy_(self.kept_asleep[name])
    if tags is None or "kv_cache" in tags:
        # kernels on the CPU multiply rows that no sequence has written by zero
        for tensor in self.model_runner.kv_caches:
            tensor.zero_()


def _weights(worker: Any) -> dict[str, torch.Tensor]:
    model = worker.get_model()
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def install(patch: pytest.MonkeyPatch) -> None:
    """Give every CPU worker this sleep, and linear layers that read their weights, not a packed copy."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils
    from vllm.v1.worker.cpu_worker import CPUWorker

    patch.setattr(_custom_ops, "_supports_onednn", False)
    patch.setattr(utils, "check_cpu_sgl_kernel", lambda *args: False)
    patch.setattr(CPUWorker, "sleep", torch.inference_mode()(sleep))
    patch.setattr(CPUWorker, "wake_up", torch.inference_mode()(wake_up))
