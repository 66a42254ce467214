"""Applying a sparse checkpoint to tensors in memory, and undoing it."""

from collections.abc import Iterable, Mapping

import torch

from opd.delta.format import Delta, Side


def apply_delta(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], delta: Delta
) -> None:
    """Convert a base model's tensors to the trained model's, in place, bit for bit.

    ``tensors``: names as in the checkpoint, such as ``dict(model.named_parameters())`` or the
    iterator itself, on any device; unchanged ones may be missing. All are checked before any is
    written. Raises ValueError for other weights than the base's.
    """
    _convert_in_place(tensors, delta, Side.base)


def undo_delta(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], delta: Delta
) -> None:
    """Convert a trained model's tensors to the base's, in place; see ``apply_delta``."""
    _convert_in_place(tensors, delta, Side.trained)


def _convert_in_place(
    tensors: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    delta: Delta,
    start: Side,
) -> None:
    live = dict(tensors)
    for name in delta.changed:
        if name not in live:
            raise ValueError(
                f"{name} changes in {delta.path} and is absent from the {len(live)} given tensors: "
                "pass those of the whole model, under the checkpoint's names"
            )
        delta.convert(name, live[name], start)
    for name in delta.changed:
        live[name].detach().copy_(delta.convert(name, live[name], start))
