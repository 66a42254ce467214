"""The routers of a mixture of experts: their number format, and how evenly they load the experts.

transformers names the class of a family's routers where it records their logits.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from opd.world import World

RECORDED = "router_logits"


def routers(causal: nn.Module) -> list[tuple[nn.Module, int]]:
    """The routers of a model, layer by layer, each with the place of its logits in what it returns.

    Empty for a model without experts.
    """
    places: dict[type, int] = {}
    for module in causal.modules():
        if isinstance(module, PreTrainedModel):
            recorded: Any = (module._can_record_outputs or {}).get(RECORDED, ())
            for each in recorded if isinstance(recorded, list | tuple) else (recorded,):
                recorder = each if isinstance(each, OutputRecorder) else OutputRecorder(each)
                places[recorder.target_class] = recorder.index
    return [(m, places[type(m)]) for m in causal.modules() if type(m) in places]


def keep_float32_routers(causal: nn.Module) -> None:
    """Let routers whose family computes them in float32 (DeepSeek V3) do so under autocast too.

    Autocast computes their product in bfloat16, whatever they cast their inputs to.
    """
    for router, place in routers(causal):
        if _computes_float32(router, place):
            router.forward = partial(_without_autocast, router.forward)


def _without_autocast(forward: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden, *args, **kwargs)


@torch.no_grad()
def _computes_float32(router: nn.Module, place: int) -> bool:
    """Whether a router in bfloat16 makes float32 logits of bfloat16 states."""
    matrix = next(p for p in router.parameters() if p.ndim == 2)
    states = torch.zeros(2, matrix.shape[1], dtype=torch.bfloat16, device=matrix.device)
    try:
        output = copy.deepcopy(router).to(torch.bfloat16)(states)
    except (TypeError, RuntimeError):  # a router that takes more than states
        return False
    logits = output[place] if isinstance(output, tuple) else output
    return logits.dtype == torch.float32


class RouterLoad:
    """Counts how often each expert is chosen, by layer; padding is left out.

    Routers that do not return the chosen experts (Llama 4) are not counted.
    """

    def __init__(self, causal: nn.Module) -> None:
        self._counts: dict[int, torch.Tensor] = {}
        self._real: torch.Tensor | None = None
        self._counting = False
        found = routers(causal)
        for number, (router, place) in enumerate(found):
            router.register_forward_hook(partial(self._count, number, place))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count inside, from zero."""
        self._counts = {}
        self._counting = True
        yield
        self._counting = False

    def expect(self, mask_BT: torch.Tensor) -> None:
        """The mask of the next forward pass: 0 at padding."""
        self._real = mask_BT.reshape(-1, 1)

    def metrics(self, world: World) -> dict[str, float]:
        """Loads relative to equal ones over all ranks: 1 is balanced; empty without experts. Collective.

        ``router/max_load`` and ``router/min_load``: of the most and the least chosen expert of any layer;
        ``router/entropy``: of the loads of a layer over its largest value, mean over layers.
        """
        if not self._counts:
            return {}
        loads, entropies = [], []
        for number in sorted(self._counts):
            counts_E = self._counts[number]
            world.add_up(counts_E)
            share_E = counts_E / counts_E.sum()
            loads.append(share_E * len(share_E))
            entropies.append(torch.special.entr(share_E).sum() / math.log(len(share_E)))
        return {
            "router/max_load": float(torch.stack([load.max() for load in loads]).max()),
            "router/min_load": float(torch.stack([load.min() for load in loads]).min()),
            "router/entropy": float(torch.stack(entropies).mean()),
        }

    def _count(self, number: int, place: int, router: nn.Module, args: Any, output: Any) -> None:
        chosen = [t for t in output if isinstance(t, torch.Tensor) and not t.is_floating_point()]
        if not self._counting or len(chosen) != 1:
            return
        assert self._real is not None, "a batch has a mask"
        chosen_NK, experts = chosen[0], output[place].shape[-1]
        if number not in self._counts:
            self._counts[number] = torch.zeros(
                experts, dtype=torch.float64, device=chosen_NK.device
            )
        weights_NK = self._real.to(chosen_NK.device).expand(chosen_NK.shape).double()
        self._counts[number].scatter_add_(0, chosen_NK.reshape(-1), weights_NK.reshape(-1))
