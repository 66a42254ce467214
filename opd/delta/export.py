"""Exporting the difference between a base and the same model trained as a sparse checkpoint."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opd.checkpoint.stored import Stored
from opd.checkpoint.tensors import Checkpoint, combine_digests, digest, dtype_name
from opd.checkpoint.writer import write_tensors
from opd.delta.format import FORMAT, INDICES, INTEGERS, XOR, Delta, Side, read_delta
from opd.mask.file import index_dtype
from opd.mask.mask import Mask

CHUNK = 1 << 24
"""Elements compared at once."""


def cast(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The same checkpoint with every floating-point tensor converted to ``dtype`` when read."""

    def converted(stored: Stored) -> Stored:
        if not stored.dtype.is_floating_point:
            return stored
        return Stored(shape=stored.shape, dtype=dtype, read=lambda: stored.read().to(dtype))

    return Checkpoint(
        f"{checkpoint.model} cast to {dtype_name(dtype)}",
        {name: converted(stored) for name, stored in checkpoint.items()},
    )


def export_delta(
    base: Checkpoint,
    trained: Checkpoint,
    path: Path,
    *,
    mask: Mask | None = None,
    command: str = "",
) -> Delta:
    """Write the sparse checkpoint that converts ``base`` to ``trained``, and open it.

    Both are read once, a tensor at a time. Raises ValueError when their names, shapes or number
    formats differ, when ``mask`` is for another base, or when a weight outside it changed.
    """
    _require_same_model(base, trained)
    if mask is not None:
        mask.require_base(base.fingerprint(), base.model)
        mask.require_parameters(base.parameters.shapes)
    digests: dict[Side, list[bytes]] = {side: [] for side in Side}
    tensors: dict[str, dict[str, Any]] = {}

    def parts() -> Iterator[tuple[str, torch.Tensor]]:
        for name in base:
            before, after = base[name].read(), trained[name].read()
            indices, xor = _differences(before, after)
            base_digest = trained_digest = digest(name, before)
            if len(indices):
                _require_inside(name, indices, mask, trained.model)
                trained_digest = digest(name, after)
                tensors[name] = {
                    "shape": list(before.shape),
                    "dtype": dtype_name(before.dtype),
                    "count": len(indices),
                    Side.base: base_digest.hex(),
                    Side.trained: trained_digest.hex(),
                }
                yield name + INDICES, indices
                yield name + XOR, xor
            digests[Side.base].append(base_digest)
            digests[Side.trained].append(trained_digest)

    def metadata() -> dict[str, str]:
        count = sum(entry["count"] for entry in tensors.values())
        return {
            "format": FORMAT,
            "base": combine_digests(digests[Side.base]),
            "trained": combine_digests(digests[Side.trained]),
            "base_model": base.model,
            "trained_model": trained.model,
            "dtype": ", ".join(sorted({dtype_name(stored.dtype) for stored in base.values()})),
            "density": repr(count / max(base.numel, 1)),
            "rule": "" if mask is None else mask.origin.rule,
            "command": command,
            "tensors": json.dumps(tensors),
        }

    write_tensors(path, parts(), metadata)
    return read_delta(path)


def _differences(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted flat indices of elements whose bits differ, and the XOR of their bits."""
    integers = INTEGERS[before.element_size()]
    old, new = (t.contiguous().reshape(-1).view(integers) for t in (before, after))
    dtype = index_dtype({"": tuple(before.shape)})
    indices, xors = [], []
    for start in range(0, max(old.numel(), 1), CHUNK):
        xor = old[start : start + CHUNK] ^ new[start : start + CHUNK]
        changed = xor.nonzero().squeeze(1)
        xors.append(xor[changed])
        indices.append((changed + start).to(dtype))
    return torch.cat(indices), torch.cat(xors)


def _require_same_model(base: Checkpoint, trained: Checkpoint) -> None:
    for name in sorted(set(base) | set(trained)):
        if name not in base or name not in trained:
            present, absent = (trained, base) if name in trained else (base, trained)
            raise ValueError(
                f"{present.model} holds {name} and {absent.model} does not: a sparse checkpoint needs "
                "a base and the same model trained"
            )
        ours, theirs = base[name], trained[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name} is {list(ours.shape)} in {base.model} and {list(theirs.shape)} in "
                f"{trained.model}: a sparse checkpoint needs a base and the same model trained"
            )
        if ours.dtype != theirs.dtype:
            raise ValueError(
                f"{name} is {dtype_name(ours.dtype)} in {base.model} and {dtype_name(theirs.dtype)} in "
                f"{trained.model}: only equal number formats can be compared; add "
                f"dtype={dtype_name(ours.dtype)} to round the trained weights to the base's format first, "
                f"or use a base in {dtype_name(theirs.dtype)}"
            )


def _require_inside(name: str, indices: torch.Tensor, mask: Mask | None, trained: str) -> None:
    if mask is None:
        return
    inside = mask.indices[name] if name in mask.shapes else indices[:0]
    outside = len(indices) - int(torch.isin(indices, inside).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(indices)} changed weights of {name} in {trained} lie outside the "
            f"mask ({mask.origin.rule}): give the mask it was trained with, or leave out mask="
        )
