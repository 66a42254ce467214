"""A sparse checkpoint onto tensors in memory, and off again."""

from collections.abc import Iterable, Mapping

import torch

from opd.delta.format import Delta, Side


def apply_delta(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], delta: Delta
) -> None:
    """Turn a base model's tensors into the trained model's, in place, bit for bit.

    ``tensors``: names as in the checkpoint, such as ``dict(model.named_parameters())`` or the
    iterator itself, on any device; those that did not change need not be there. All are checked
    before any is written. Raises ValueError for other weights than the base's.
    """
    _turn_in_place(tensors, delta, Side.base)


def undo_delta(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], delta: Delta
) -> None:
    """Turn a trained model's tensors back into the base's, in place; as ``apply_delta``."""
    _turn_in_place(tensors, delta, Side.trained)


def _turn_in_place(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    delta: Delta,
    start: Side,
) -> None:
    ours = dict(tensors)
    for name in delta.changed:
        if name not in ours:
            raise ValueError(
                f"{name} changes in {delta.path} and is absent from the {len(ours)} tensors given: "
                "give those of the whole model, under the checkpoint's names"
            )
        delta.turned(name, ours[name], start)
    for name in delta.changed:
        ours[name].detach().copy_(delta.turned(name, ours[name], start))
