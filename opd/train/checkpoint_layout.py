"""How a model's tensors in memory correspond to those of its checkpoint.

transformers renames, fuses and splits tensors when it loads a checkpoint: the experts of a mixture lie in
one tensor in memory, one tensor each in the files. Its own conversions, reversed, give back names and
shapes of the files; applied to coordinates in place of weights, they say where each weight went.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

from opd.checkpoint.tensors import Stored

Shapes = Mapping[str, tuple[int, ...]]


def to_checkpoint(causal: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of whole decoder layers by their names in memory -> by their names in the checkpoint.

    Most results are views of what is given.
    """
    return revert_weight_conversion(causal, dict(tensors))


def stored_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, buffer) of the buffers that checkpoints hold, such as the correction bias of a router."""
    for prefix, module in model.named_modules():
        for leaf, buffer in own_stored_buffers(module):
            yield f"{prefix}.{leaf}" if prefix else leaf, buffer


def own_stored_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(leaf, buffer) of those that a module owns itself."""
    for leaf, buffer in module.named_buffers(recurse=False):
        if leaf not in module._non_persistent_buffers_set:
            yield leaf, buffer


@dataclass(frozen=True, slots=True)
class _Group:
    """The converted tensors of one decoder layer: their shapes in memory, in order."""

    shapes: Shapes

    @property
    def numel(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes.values())

    def coordinates(self, causal: Any) -> dict[str, torch.Tensor]:
        """For each tensor of the checkpoint, flat: where its weights lie in the memory of the group."""
        dtype = torch.int32 if self.numel < 2**31 else torch.int64
        flat = torch.arange(self.numel, dtype=dtype)
        tensors = {name: part.view(self.shapes[name]) for name, part in self._split(flat).items()}
        return {n: t.reshape(-1) for n, t in to_checkpoint(causal, tensors).items()}

    def _split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        return dict(zip(self.shapes, flat.split(sizes), strict=True))


class CheckpointLayout:
    """Where the weights of a checkpoint lie in the memory of ``causal``.

    ``shapes``: of the model's parameters by their names in memory. Tensors that keep name and shape cost
    nothing; for the others a layer's coordinates are computed when they are needed.
    """

    def __init__(self, causal: Any, shapes: Shapes) -> None:
        self._causal = causal
        self._shapes = shapes
        self._groups: dict[str, _Group] = {}
        self._stored: dict[str, tuple[int, ...]] = {}
        for _, layer in groupby(shapes, key=layer_key):
            group = {name: shapes[name] for name in layer}
            meta = {n: torch.empty(shape, device="meta") for n, shape in group.items()}
            stored = {n: tuple(t.shape) for n, t in to_checkpoint(causal, meta).items()}
            self._stored |= stored
            changed = {n: shape for n, shape in group.items() if stored.get(n) != shape}
            self._groups |= dict.fromkeys(changed, _Group(changed))

    @property
    def checkpoint_shapes(self) -> Shapes:
        """Shapes of the parameters by their names in the checkpoint."""
        return self._stored

    def indices(self, kept: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in memory, sorted flat coordinates) of what a mask of the checkpoint keeps."""
        for name, group in self._groups_once():
            if group is None:
                yield name, kept[name]
                continue
            coordinates = group.coordinates(self._causal)
            lies_at = torch.cat([at[kept[stored].long()] for stored, at in coordinates.items()])
            start = 0
            for part, shape in group.shapes.items():
                stop = start + torch.Size(shape).numel()
                inside = lies_at[(lies_at >= start) & (lies_at < stop)]
                yield part, (inside - start).sort().values
                start = stop

    def base(self, checkpoint: Mapping[str, Stored]) -> dict[str, Stored]:
        """The checkpoint's tensors by their names in memory, each read (and fused) when needed."""
        found = dict(checkpoint)
        for name, shape in self._shapes.items():
            group = self._groups.get(name)
            if group is not None:
                found[name] = Stored(
                    shape=shape,
                    dtype=self._group_dtype(group, checkpoint),
                    read=lambda name=name, group=group: self._fused(name, group, checkpoint),
                )
        return found

    def _group_dtype(self, group: _Group, checkpoint: Mapping[str, Stored]) -> torch.dtype:
        meta = {n: torch.empty(shape, device="meta") for n, shape in group.shapes.items()}
        return checkpoint[next(iter(to_checkpoint(self._causal, meta)))].dtype

    def _fused(self, name: str, group: _Group, checkpoint: Mapping[str, Stored]) -> torch.Tensor:
        flat = torch.empty(group.numel, dtype=self._group_dtype(group, checkpoint))
        for stored, at in group.coordinates(self._causal).items():
            flat[at.long()] = checkpoint[stored].read().reshape(-1).to(flat.dtype)
        return group._split(flat)[name].view(group.shapes[name])

    def views(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name in the checkpoint, view to write into) of the tensors in memory, given by their names there.

        Raises ValueError where a tensor of the checkpoint is no regular part of one in memory.
        """
        for name, group in self._groups_once():
            if group is None:
                yield name, tensors[name]
                continue
            start = {}
            for part, shape in group.shapes.items():
                start[part] = sum(torch.Size(group.shapes[p]).numel() for p in start)
                assert tuple(tensors[part].shape) == shape
            for stored, at in group.coordinates(self._causal).items():
                part = max((p for p in start if start[p] <= int(at[0])), key=start.__getitem__)
                shape = self._stored[stored]
                yield stored, _strided(tensors[part], (at - start[part]).view(shape), stored)

    def _groups_once(self) -> Iterator[tuple[str, _Group | None]]:
        """Unchanged names with None, and each group of changed ones once."""
        done: set[int] = set()
        for name in self._shapes:
            group = self._groups.get(name)
            if group is None or id(group) not in done:
                done.add(id(group))
                yield name, group


def _strided(tensor: torch.Tensor, at: torch.Tensor, name: str) -> torch.Tensor:
    """The view of a contiguous ``tensor`` whose elements lie at the flat coordinates ``at``."""
    first = at[(0,) * at.ndim]
    strides, expected = [], first
    for dim, size in enumerate(at.shape):
        along = at.movedim(dim, 0).reshape(size, -1)[:, 0]
        strides.append(int(along[1] - along[0]) if size > 1 else 1)
        steps = torch.arange(size) * strides[-1]
        expected = expected + steps.view([-1 if d == dim else 1 for d in range(at.ndim)])
    if not torch.equal(expected.to(at.dtype), at):
        raise ValueError(
            f"{name} lies scattered in the memory of the model, so that new weights cannot be written in "
            "place: use rollout=vllm"
        )
    return tensor.detach().as_strided(at.shape, strides, int(first))


def layer_key(name: str) -> str:
    """The key of weights that are gathered together: the name up to its first number, the layer's."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name
