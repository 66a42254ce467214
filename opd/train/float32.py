"""Forward passes in float32 of weights that are held in another dtype, or in parts on other ranks."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from opd.train.compact import full_shape


@contextmanager
def float32_layers(model: nn.Module, whole: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Inside, ``model`` computes without gradients as if its weights were float32; collective.

    The weights of a decoder layer, and those that another module owns itself, are gathered where ZeRO
    has partitioned them, and cast, while that module runs, so that one layer is whole in float32 at a
    time. Those of ``whole`` are so all the time: the head, which is read without calling its module.
    Afterwards every weight is what it was. Nothing is done to whole float32 weights.
    """
    weights = _Float32Weights()
    with ExitStack() as stack:
        for module, parameters in _units(model):
            given = [p for p in parameters if _is_partitioned(p) or p.dtype != torch.float32]
            if given:
                stack.callback(module.register_forward_pre_hook(_before(weights, given)).remove)
                after = module.register_forward_hook(_after(weights, given), always_call=True)
                stack.callback(after.remove)
        held = list(whole)
        weights.enter(held)
        stack.callback(weights.leave, held)
        yield


def _units(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules and the parameters that their forward passes read: their own, and all of a decoder layer.

    Inside a layer modules read each other's weights (a router's weight, an adapter's dtype).
    """
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own:
            yield module, own
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+(\.|$)", name):
            for layer in module:
                yield layer, list(layer.parameters())


def _is_partitioned(parameter: Any) -> bool:
    return full_shape(parameter) != tuple(parameter.shape)


class _Float32Weights:
    """Weights that are whole and in float32 as long as somebody uses them; a tied one has several users."""

    def __init__(self) -> None:
        self._users: Counter[int] = Counter()
        self._held: dict[int, torch.Tensor] = {}
        self._partitioned: set[int] = set()

    def enter(self, parameters: Sequence[Any]) -> None:
        new = {id(p): p for p in parameters if not self._users[id(p)]}
        self._users.update(map(id, parameters))
        partitioned = [p for p in new.values() if _is_partitioned(p)]
        if partitioned:
            partitioned[0].all_gather(param_list=partitioned)
        self._partitioned.update(map(id, partitioned))
        for key, parameter in new.items():
            self._held[key] = parameter.data
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()

    def leave(self, parameters: Sequence[Any]) -> None:
        self._users.subtract(map(id, parameters))
        unused = {id(p): p for p in parameters if not self._users[id(p)]}
        for key, parameter in unused.items():
            parameter.data = self._held.pop(key)
        partitioned = [p for key, p in unused.items() if key in self._partitioned]
        if partitioned:
            partitioned[0].partition(param_list=partitioned, has_been_updated=False)
        self._partitioned.difference_update(unused)


def _before(weights: _Float32Weights, given: Sequence[nn.Parameter]) -> Callable[..., None]:
    return lambda module, arguments: weights.enter(given)


def _after(weights: _Float32Weights, given: Sequence[nn.Parameter]) -> Callable[..., None]:
    return lambda module, arguments, output: weights.leave(given)
