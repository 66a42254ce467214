"""A reload of vLLM's weights that also reaches those which vLLM's own reload leaves stale.

While vLLM reloads, its parameters lie on the meta device. Their loaders keep the weights of a layer until
it is complete; then it is loaded, packed for the platform's kernels, and copied into the tensors that the
engine computes with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def reload(worker: Any, weights: Iterator[tuple[str, torch.Tensor]], *, observe: bool) -> bool:
    """Load ``weights``, under the checkpoint's names, into the model of a worker.

    With ``observe``, weights that a family writes without a parameter's loader reach it too (see
    ``DirectWrites``); returns whether there were any.

    The experts of a mixture are packed anew on a CPU. There a kernel reads them in a packed order. vLLM packs
    them only where no kernel exists yet; otherwise it leaves them in the order of the files, and the
    engine computes another model, without any error. Experts that the reload has not reached keep their
    kernel.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
        UnquantizedFusedMoEMethod,
    )

    model = worker.get_model()
    kernels: dict[Any, Any] = {}
    if worker.device.type == "cpu":
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, UnquantizedFusedMoEMethod):
                kernels[method] = method.moe_kernel
                method.moe_kernel = None
    if observe:
        writes = DirectWrites(model)
        with writes:
            worker.reload_weights(weights_iterator=writes.followed(weights))
        found = writes.found
    else:
        worker.reload_weights(weights_iterator=weights)
        found = False
    for method, kernel in kernels.items():
        method.moe_kernel = method.moe_kernel or kernel
    return found


@dataclass(frozen=True, slots=True)
class _Write:
    """A copy into a part of a parameter."""

    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    source: torch.Tensor

    def repeat(self, layer: torch.nn.Module) -> None:
        parameter = layer.get_parameter(self.name).data
        parameter.as_strided(self.size, self.stride, self.offset).copy_(self.source)


class DirectWrites(TorchDispatchMode):
    """Repeats writes into parameters that go around the parameters' loaders; without this they are lost.

    GPT-OSS writes its experts and sinks so (``param.copy_``). A copy into a parameter on the meta device
    leaves no trace; here it is kept until its layer is complete and then made again.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.found = False
        self._model = model
        self._owners: dict[int, tuple[torch.nn.Module, str]] = {}
        self._writes: dict[torch.nn.Module, list[_Write]] = {}

    def followed(
        self, weights: Iterator[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights``; between them, complete layers are loaded."""
        for named in weights:
            yield named
            self._load(complete=True)
        self._load(complete=False)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].is_meta and not args[1].is_meta:
            self._keep(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _keep(self, part: torch.Tensor, source: torch.Tensor) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        if not self._owners:
            self._owners = {
                parameter.untyped_storage()._cdata: (layer, name)
                for layer in self._model.modules()
                for name, parameter in layer.named_parameters(recurse=False)
                if parameter.is_meta
            }
        layer, name = self._owners.get(part.untyped_storage()._cdata, (None, ""))
        # a loader lists its parameter before it writes
        if layer is None or name in dict(get_layerwise_info(layer).loaded_weights):
            return
        self.found = True
        write = _Write(name, part.size(), part.stride(), int(part.storage_offset()), source)
        self._writes.setdefault(layer, []).append(write)

    def _load(self, *, complete: bool) -> None:
        """Load the layers that have been written into; only ``complete`` ones, or all."""
        from vllm.model_executor.model_loader.reload import layerwise
        from vllm.model_executor.model_loader.reload.meta import materialize_layer
        from vllm.model_executor.model_loader.reload.utils import get_layer_size

        for layer, writes in list(self._writes.items()):
            info = layerwise.get_layerwise_info(layer)
            written = sum(write.source.numel() for write in writes) + info.load_numel
            if complete and written < get_layer_size(layer):
                continue
            materialize_layer(layer, info)
            for write in writes:
                write.repeat(layer)
            layerwise._layerwise_process(layer, info)
            del self._writes[layer]
