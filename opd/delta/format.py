"""Sparse checkpoints: the weights in which a trained model differs from its base, and their bits.

A file holds, for every changed parameter, the sorted flat coordinates whose bits differ and the XOR
of the bit patterns there. XOR is its own inverse: one array leads from the base to the trained model
and back, exactly, for every bit pattern (NaN, -0.0 and infinities included); new and old values would
take two, and a difference of floats would round.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from opd.checkpoint.tensors import digest, dtype_name
from opd.mask.file import require_coordinates

FORMAT = "opd-delta-1"
COORDINATES, XOR = ".coordinates", ".xor"
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers that hold the bits of an element of so many bytes."""


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
        require_coordinates(coordinates, numel, f"{name} in {self.path}")
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
        if tuple(tensor.shape) != changed.shape or dtype_name(tensor.dtype) != changed.dtype:
            raise ValueError(
                f"{name} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, the delta {self.path} was "
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


def _other(side: Side) -> Side:
    return Side.trained if side == Side.base else Side.base


def read_delta(path: Path) -> Delta:
    """A sparse checkpoint; tensors are read when asked for.

    Raises ValueError when the file is missing, cut short, or none of ours.
    """
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
            f"{path} is not an opd sparse checkpoint (format {found}, expected {FORMAT}): make one "
            "with `opd mask export`"
        )
    return Delta(path, opened)
