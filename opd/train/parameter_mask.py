"""Which coordinates are trained: all, or those of a mask, stored compactly or restored after a step."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils import parametrize

from opd.mask.mask import Mask
from opd.train.checkpoint_layout import layer_key
from opd.train.compact import MaskedWeight
from opd.train.engine import TrainingEngine
from opd.train.weights import checkpoint_layout, named_weights


class ParameterMask(Protocol):
    """Restricts training to some coordinates of a model.

    ``mask`` is the fingerprint of the mask, "" when there is none.
    """

    mask: str

    def metrics(self) -> dict[str, float]:
        """Metrics that every step reports."""
        ...

    def gradients(self) -> list[torch.Tensor]:
        """Gradients of trained coordinates, in the order of the parameters, for the gradient norm."""
        ...

    def write_back(self, engine: TrainingEngine) -> None:
        """Make the model's weights agree with the mask after an optimizer step or a load; collective."""
        ...


class DenseTraining:
    """Implements ``ParameterMask``: every parameter that requires a gradient is trained."""

    def __init__(self, model: nn.Module) -> None:
        self.mask = ""
        self._model = model

    def metrics(self) -> dict[str, float]:
        return {}

    def gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._model.parameters() if p.grad is not None]

    def write_back(self, engine: TrainingEngine) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _MaskedParameter:
    """A trained parameter: its dense name, what the optimizer trains, and where that is written back."""

    name: str
    trained: nn.Parameter
    masked: MaskedWeight | None


class SparseTraining:
    """Implements ``ParameterMask`` by changing a causal language model in place (see ``MaskedWeight``).

    Parameters of which nothing is kept are frozen; those that are kept whole are trained as they are.
    Raises ValueError when the mask names other parameters than the model has.
    """

    def __init__(self, causal: nn.Module, mask: Mask) -> None:
        self.mask = mask.fingerprint()
        self._trained = list(_masked_parameters(causal, mask))
        self._density = mask.density

    def metrics(self) -> dict[str, float]:
        return {"mask/density": self._density}

    def gradients(self) -> list[torch.Tensor]:
        return [p.trained.grad for p in self._trained if p.trained.grad is not None]

    @torch.no_grad()
    def write_back(self, engine: TrainingEngine) -> None:
        """Write the trained values into the dense weights, a layer at a time."""
        for _, layer in groupby(self._trained, key=lambda p: layer_key(p.name)):
            compact = [(p.trained, p.masked) for p in layer if p.masked is not None]
            with engine.gathered([values for values, _ in compact]):
                for values, masked in compact:
                    _write_back(values, masked, engine)


def _write_back(values: torch.Tensor, masked: MaskedWeight, engine: TrainingEngine) -> None:
    """Write all values [kept] into this rank's parts of the dense weight."""
    index = masked.index
    for part, start in engine.parts(masked.frozen):
        low, high = 0, len(index)
        if len(part) < masked.size:  # a shard
            ends = index.new_tensor([start, start + len(part)])
            low, high = torch.searchsorted(index, ends).tolist()
        part[index[low:high].long() - start] = values[low:high].to(part.dtype)


def _indices_in_memory(causal: nn.Module, mask: Mask) -> dict[str, torch.Tensor]:
    """The kept coordinates of every parameter, sorted, by its name in memory.

    ValueError when the mask has other parameters than the checkpoint of the model.
    """
    layout = checkpoint_layout(causal)
    mask.require_parameters(layout.checkpoint_shapes)
    return dict(layout.indices(mask.indices))


def _masked_parameters(causal: nn.Module, mask: Mask) -> Iterator[_MaskedParameter]:
    """Freeze, parametrize or leave each weight of the model; yields those that are trained."""
    indices = _indices_in_memory(causal, mask)
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in causal.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            uses.setdefault(id(parameter), []).append((module, leaf))
    for name, parameter in list(named_weights(causal)):  # modules change inside
        index = indices[name]
        if len(index) == 0:
            parameter.requires_grad_(False)
        elif len(index) == parameter.numel():
            yield _MaskedParameter(name=name, trained=parameter, masked=None)
        else:
            masked = MaskedWeight(parameter, index)
            for module, leaf in uses[id(parameter)]:
                parametrize.register_parametrization(module, leaf, masked, unsafe=True)
            yield _MaskedParameter(name=name, trained=parameter, masked=masked)


class RestoredTraining:
    """Implements ``ParameterMask`` as the paper does: the slow reference for ``SparseTraining``.

    Off-mask gradients are set to zero before they are reduced. After each step off-mask coordinates
    get their initial values back, masters included. Gradients, optimizer state and masters stay dense.
    Raises ValueError when the mask names other parameters than the model has.
    Source: "Dense Supervision, Sparse Updates", section on masked retraining.
    """

    def __init__(self, causal: nn.Module, mask: Mask) -> None:
        indices = _indices_in_memory(causal, mask)
        self.mask = mask.fingerprint()
        self._density = mask.density
        self._restored = [_Restored(p, indices[name]) for name, p in named_weights(causal)]

    def metrics(self) -> dict[str, float]:
        return {"mask/density": self._density}

    def gradients(self) -> list[torch.Tensor]:
        return [
            r.parameter.grad[r.kept]
            for r in self._restored
            if r.parameter.grad is not None and r.kept.any()
        ]

    @torch.no_grad()
    def write_back(self, engine: TrainingEngine) -> None:
        for each in self._restored:
            engine.rewrite(each.parameter, each.restored)


class _Restored:
    """A weight, its initial values, and which of its coordinates are trained."""

    def __init__(self, parameter: nn.Parameter, index: torch.Tensor) -> None:
        self.parameter = parameter
        self.base = parameter.detach().clone()
        kept = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
        kept[index.long()] = True
        self.kept = kept.view(parameter.shape)
        parameter.register_hook(self._masked_gradient)

    def _masked_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        return torch.where(self.kept, grad, torch.zeros_like(grad))

    def restored(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` with the initial values off the mask."""
        return torch.where(self.kept, weight, self.base.to(weight.dtype))
