"""A weight of which only some coordinates are trained.

It is held twice: dense and frozen, which the forward pass uses, and as ``values``, the kept
coordinates alone, which the optimizer trains. The backward pass hands ``values`` the gradient at the
kept coordinates; after each optimizer step they are written back into the dense weight.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize


class _Tap(torch.autograd.Function):
    """The dense weight in the forward pass; in the backward pass its gradient where it is kept.

    Selection, not multiplication: an infinite gradient elsewhere leaves no trace.
    """

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, frozen: torch.Tensor, index: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(index)
        return frozen.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # pyright: ignore
        (index,) = ctx.saved_tensors
        return grad.reshape(-1).index_select(0, index), None, None


class MaskedWeight(nn.Module):
    """Parametrization of a weight of any shape by its kept coordinates.

    ``frozen`` is the dense weight and holds what was written back last; ``index`` [kept] sorted flat
    coordinates, neither all nor none.
    """

    def __init__(self, weight: torch.Tensor, index: torch.Tensor) -> None:
        super().__init__()
        assert 0 < len(index) < weight.numel()
        self.frozen = nn.Parameter(weight.detach(), requires_grad=False)
        self.matrix = weight.ndim > 1
        self.size = weight.numel()
        self.index: torch.Tensor
        self.register_buffer("index", index.to(weight.device), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return _Tap.apply(values, self.frozen, self.index)  # pyright: ignore

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        """The kept values of a weight; the other end of a tied weight brings them already."""
        if weight.shape == self.index.shape:
            return weight
        return weight.detach().reshape(-1).index_select(0, self.index)


def full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of the whole parameter, also where DeepSpeed holds a shard of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def dense_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(leaf, dense parameter) that a module owns itself, masked ones included."""
    yield from module.named_parameters(recurse=False)
    if parametrize.is_parametrized(module):
        lists: Any = module.parametrizations
        for leaf, parametrizations in lists.items():
            yield leaf, parametrizations[0].frozen


def compact_ends(model: nn.Module) -> dict[int, tuple[nn.Parameter, torch.Tensor]]:
    """id of a masked dense weight -> what is trained of it (values [kept], index [kept])."""
    ends: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            masked: Any = module[0]
            if isinstance(masked, MaskedWeight):
                values: Any = module.original
                ends[id(masked.frozen)] = (values, masked.index)
    return ends


def matrices_and_vectors(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trained parameters by the rank of the weight that they belong to: 2-D and more, the rest."""
    of_matrices: set[int] = set()
    for module in model.modules():
        if isinstance(module, parametrize.ParametrizationList):
            masked = module[0]
            if isinstance(masked, MaskedWeight) and masked.matrix:
                of_matrices.add(id(module.original))
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(full_shape(p)) > 1 or id(p) in of_matrices]
    vectors = [p for p in trained if len(full_shape(p)) <= 1 and id(p) not in of_matrices]
    return matrices, vectors
