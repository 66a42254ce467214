"""Sparse checkpoints: the weights in which a trained model differs from its base, and their bits.

A file holds, for every changed parameter, the sorted flat coordinates whose bits differ and the XOR
of the bit patterns there. XOR is its own inverse: one array leads from the base to the trained model
and back, exactly, for every bit pattern (NaN, -0.0 and infinities included); new and old values would
take two, and a difference of floats would round.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from opd.mask.mask import Mask, index_dtype, require_sound
from opd.checkpoint.writer import write_tensors
from opd.checkpoint.tensors import Checkpoint, Stored, digest, fingerprint_of

FORMAT = "opd-delta-1"
COORDINATES, XOR = ".coordinates", ".xor"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that hold the bits of an element of so many bytes."""
CHUNK = 1 << 24
"""Elements compared at once."""


class Side(StrEnum):
    """The two models between which a delta leads."""

    base = "base"
    trained = "trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """One of the two models: what it was called, and its fingerprint."""

    model: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A changed parameter: its shape, its number format, and the digest of its bits on either side."""

    shape: tuple[int, ...]
    dtype: str
    count: int
    digests: Mapping[Side, str]


class Delta:
    """A sparse checkpoint; ``changed`` lists the changed parameters, ``bits`` reads one of them."""

    def __init__(self, path: Path, opened: Any) -> None:
        found = opened.metadata()
        self.path = path
        self.ends = {
            side: End(model=found[f"{side}_model"], fingerprint=found[side]) for side in Side
        }
        self.dtype: str = found["dtype"]
        self.density = float(found["density"])
        self.rule: str = found["rule"]
        self.command: str = found["command"]
        self.changed = {
            name: Changed(
                shape=tuple(told["shape"]),
                dtype=told["dtype"],
                count=told["count"],
                digests={side: told[side] for side in Side},
            )
            for name, told in json.loads(found["tensors"]).items()
        }
        self._opened = opened

    @property
    def count(self) -> int:
        """Changed weights."""
        return sum(changed.count for changed in self.changed.values())

    def bits(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(sorted flat coordinates, XOR of the bit patterns there) [count] of a changed parameter."""
        coordinates: torch.Tensor = self._opened.get_tensor(name + COORDINATES)
        xor: torch.Tensor = self._opened.get_tensor(name + XOR)
        changed = self.changed[name]
        numel = torch.Size(changed.shape).numel()
        require_sound(coordinates, numel, f"{name} in {self.path}")
        if not len(coordinates) == len(xor) == changed.count:
            raise ValueError(
                f"{name} in {self.path} holds {len(coordinates)} coordinates, {len(xor)} values and "
                f"announces {changed.count}: export it again"
            )
        return coordinates, xor

    def require(self, side: Side, fingerprint: str, model: str) -> None:
        """ValueError unless the fingerprint is that of the base, or of the trained model."""
        end = self.ends[side]
        if fingerprint != end.fingerprint:
            raise ValueError(
                f"{self.path} needs its {side} model {end.model} (fingerprint "
                f"{end.fingerprint[:12]}), found {model} (fingerprint {fingerprint[:12]}): name that "
                "model, or export a delta for this one"
            )

    def turned(self, name: str, tensor: torch.Tensor, start: Side) -> torch.Tensor:
        """A changed parameter's tensor of the other side, on the CPU, from that of side ``start``.

        ValueError when the bits given are not those of that side, or the file's are damaged.
        """
        changed = self.changed[name]
        if tuple(tensor.shape) != changed.shape or word(tensor.dtype) != changed.dtype:
            raise ValueError(
                f"{name} is {word(tensor.dtype)} {list(tensor.shape)}, the delta {self.path} was "
                f"made for {changed.dtype} {list(changed.shape)}: load the model as it is stored"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if digest(name, flat.reshape(changed.shape)).hex() != changed.digests[start]:
            raise ValueError(
                f"{name} does not hold the bits of {self.ends[start].model}, from which "
                f"{self.path} leads on: give the {start} model itself"
            )
        turned = flat.clone()
        coordinates, xor = self.bits(name)
        turned.view(INTEGERS[tensor.element_size()])[coordinates.long()] ^= xor
        turned = turned.reshape(changed.shape)
        if digest(name, turned).hex() != changed.digests[_other(start)]:
            raise ValueError(f"{self.path} is damaged at {name}: fetch or export it again")
        return turned


def word(dtype: torch.dtype) -> str:
    """The name of a number format as people type it: bfloat16."""
    return str(dtype).removeprefix("torch.")


def _other(side: Side) -> Side:
    return Side.trained if side == Side.base else Side.base


def read_delta(path: Path) -> Delta:
    """A sparse checkpoint; tensors are read when asked for.

    Raises ValueError when the file is missing, cut short, or none of ours.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no sparse checkpoint {path}: make one with `opd mask export`")
    try:
        opened: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as a sparse checkpoint ({error}): fetch or export it again"
        ) from None
    found = (opened.metadata() or {}).get("format")
    if found != FORMAT:
        raise ValueError(
            f"{path} is no sparse checkpoint of ours (format {found}, expected {FORMAT}): make one "
            "with `opd mask export`"
        )
    return Delta(path, opened)


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


def cast(checkpoint: Checkpoint, dtype: torch.dtype) -> Checkpoint:
    """The same weights with every floating-point tensor in ``dtype``, converted when read."""

    def converted(stored: Stored) -> Stored:
        if not stored.dtype.is_floating_point:
            return stored
        return Stored(shape=stored.shape, dtype=dtype, read=lambda: stored.read().to(dtype))

    return Checkpoint(
        f"{checkpoint.model} cast to {word(dtype)}",
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
    """Write the sparse checkpoint that leads from ``base`` to ``trained``, and open it.

    Both are read once, a tensor at a time. Raises ValueError when they are not the same names,
    shapes and number formats, when ``mask`` is for another base, or when a weight outside it changed.
    """
    _require_alike(base, trained)
    if mask is not None:
        mask.require_base(base.fingerprint(), base.model)
        mask.require_parameters(base.shapes)
    digests: dict[Side, list[bytes]] = {side: [] for side in Side}
    tensors: dict[str, dict[str, Any]] = {}

    def parts() -> Iterator[tuple[str, torch.Tensor]]:
        for name in base:
            before, after = base[name].read(), trained[name].read()
            coordinates, xor = _differences(before, after)
            was = now = digest(name, before)
            if len(coordinates):
                _require_inside(name, coordinates, mask, trained.model)
                now = digest(name, after)
                tensors[name] = {
                    "shape": list(before.shape),
                    "dtype": word(before.dtype),
                    "count": len(coordinates),
                    Side.base: was.hex(),
                    Side.trained: now.hex(),
                }
                yield name + COORDINATES, coordinates
                yield name + XOR, xor
            digests[Side.base].append(was)
            digests[Side.trained].append(now)

    def metadata() -> dict[str, str]:
        count = sum(told["count"] for told in tensors.values())
        return {
            "format": FORMAT,
            "base": fingerprint_of(digests[Side.base]),
            "trained": fingerprint_of(digests[Side.trained]),
            "base_model": base.model,
            "trained_model": trained.model,
            "dtype": ", ".join(sorted({word(stored.dtype) for stored in base.values()})),
            "density": repr(count / max(base.numel, 1)),
            "rule": "" if mask is None else mask.origin.rule,
            "command": command,
            "tensors": json.dumps(tensors),
        }

    write_tensors(path, parts(), metadata)
    return read_delta(path)


def _differences(before: torch.Tensor, after: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sorted flat coordinates whose bits differ, and the XOR of the bits there."""
    integers = INTEGERS[before.element_size()]
    ours, theirs = (t.contiguous().reshape(-1).view(integers) for t in (before, after))
    dtype = index_dtype({"": tuple(before.shape)})
    coordinates, xors = [], []
    for start in range(0, max(ours.numel(), 1), CHUNK):
        xor = ours[start : start + CHUNK] ^ theirs[start : start + CHUNK]
        changed = xor.nonzero().squeeze(1)
        xors.append(xor[changed])
        coordinates.append((changed + start).to(dtype))
    return torch.cat(coordinates), torch.cat(xors)


def _require_alike(base: Checkpoint, trained: Checkpoint) -> None:
    for name in sorted(set(base) | set(trained)):
        if name not in base or name not in trained:
            there, lacking = (trained, base) if name in trained else (base, trained)
            raise ValueError(
                f"{there.model} holds {name} and {lacking.model} does not: a sparse checkpoint is "
                "between a base and the same model trained"
            )
        ours, theirs = base[name], trained[name]
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name} is {list(ours.shape)} in {base.model} and {list(theirs.shape)} in "
                f"{trained.model}: a sparse checkpoint is between a base and the same model trained"
            )
        if ours.dtype != theirs.dtype:
            raise ValueError(
                f"{name} is {word(ours.dtype)} in {base.model} and {word(theirs.dtype)} in "
                f"{trained.model}: only bits of one number format compare; add "
                f"dtype={word(ours.dtype)} to round the trained weights to the base's format first, "
                f"or name a base in {word(theirs.dtype)}"
            )


def _require_inside(name: str, coordinates: torch.Tensor, mask: Mask | None, trained: str) -> None:
    if mask is None:
        return
    outside = len(coordinates) - int(torch.isin(coordinates, mask.indices[name]).sum())
    if outside:
        raise ValueError(
            f"{outside} of {len(coordinates)} changed weights of {name} in {trained} lie outside the "
            f"mask ({mask.origin.rule}): name the mask it was trained with, or leave out mask="
        )
