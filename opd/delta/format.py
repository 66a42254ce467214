"""Sparse checkpoints: the weights in which a trained model differs from its base, and their bits.

For every changed parameter a file holds the sorted flat indices of the elements whose bits differ, and
the XOR of their bit patterns. XOR is its own inverse: one array converts the base to the trained model
and back, exactly, for every bit pattern (NaN, -0.0 and infinities included). New and old values would
need two arrays, and a difference of floats would be rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from pydantic import Json, NonNegativeInt
from safetensors import SafetensorError, safe_open

from opd.checked_json import TensorShape, read_texts
from opd.checkpoint.stored import DTYPES
from opd.checkpoint.tensors import digest, dtype_name, torch_dtype
from opd.mask.file import require_indices

FORMAT = "opd-delta-1"
INDICES, XOR = ".coordinates", ".xor"
"""Suffixes of the two tensors of a parameter in the file."""
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer types by the bytes of an element."""


class Side(StrEnum):
    """The two models of a sparse checkpoint."""

    base = "base"
    trained = "trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """One of the two models: its name when the file was made, and its fingerprint."""

    name: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedParameter:
    """A changed parameter: shape, number format, changed weights, and the digests of both sides."""

    shape: tuple[int, ...]
    dtype: str
    count: int
    digests: Mapping[Side, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeltaEntry:
    """A changed parameter, as the header lists it."""

    shape: TensorShape
    dtype: str
    count: NonNegativeInt
    base: str
    trained: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _DeltaMetadata:
    """What the header of a sparse checkpoint says besides its format."""

    base: str
    base_model: str
    trained: str
    trained_model: str
    dtype: str
    density: float
    rule: str
    command: str
    tensors: Json[dict[str, _DeltaEntry]]


class Delta:
    """A sparse checkpoint; ``changed`` lists the changed parameters, ``read`` reads one of them."""

    def __init__(self, path: Path, opened: Any) -> None:
        found = read_texts(opened.metadata(), _DeltaMetadata, path, "fetch or export it again")
        self.path = path
        self.models = {
            Side.base: ModelIdentity(name=found.base_model, fingerprint=found.base),
            Side.trained: ModelIdentity(name=found.trained_model, fingerprint=found.trained),
        }
        self.dtype = found.dtype
        self.density = found.density
        self.rule = found.rule
        self.command = found.command
        self.changed = {
            name: ChangedParameter(
                shape=entry.shape,
                dtype=entry.dtype,
                count=entry.count,
                digests={Side.base: entry.base, Side.trained: entry.trained},
            )
            for name, entry in found.tensors.items()
        }
        self._opened = opened
        _require_tensors(self, set(opened.keys()))

    @property
    def count(self) -> int:
        """Number of changed weights."""
        return sum(changed.count for changed in self.changed.values())

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(sorted flat indices, XOR of the bit patterns) [count] of a changed parameter."""
        indices: torch.Tensor = self._opened.get_tensor(name + INDICES)
        xor: torch.Tensor = self._opened.get_tensor(name + XOR)
        changed = self.changed[name]
        numel = torch.Size(changed.shape).numel()
        require_indices(indices, numel, f"{name} in {self.path}")
        expected = _bits_dtype(changed.dtype)
        if xor.ndim != 1 or xor.dtype != expected:
            raise ValueError(
                f"the values of {name} in {self.path} are {list(xor.shape)} {xor.dtype}, expected flat "
                f"{expected}: export it again"
            )
        if not len(indices) == len(xor) == changed.count:
            raise ValueError(
                f"{name} in {self.path} holds {len(indices)} indices and {len(xor)} values, "
                f"expected {changed.count} of each: export it again"
            )
        return indices, xor

    def require_model(self, side: Side, fingerprint: str, model: str) -> None:
        """ValueError unless the fingerprint is that of the base, or of the trained model."""
        expected = self.models[side]
        if fingerprint != expected.fingerprint:
            raise ValueError(
                f"{self.path} needs its {side} model {expected.name} (fingerprint "
                f"{expected.fingerprint[:12]}), found {model} (fingerprint {fingerprint[:12]}): use that "
                "model, or export a delta for this one"
            )

    def convert(self, name: str, tensor: torch.Tensor, start: Side) -> torch.Tensor:
        """A changed parameter's tensor in the other model, on the CPU, from that in model ``start``.

        ValueError when ``tensor`` does not have the bits of that model, or the file is damaged.
        """
        changed = self.changed[name]
        if tuple(tensor.shape) != changed.shape or dtype_name(tensor.dtype) != changed.dtype:
            raise ValueError(
                f"{name} is {dtype_name(tensor.dtype)} {list(tensor.shape)}, and the delta {self.path} was "
                f"made for {changed.dtype} {list(changed.shape)}: load the model as it is stored"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if digest(name, flat.reshape(changed.shape)).hex() != changed.digests[start]:
            raise ValueError(
                f"{name} does not hold the bits of {self.models[start].name}, which "
                f"{self.path} converts: give the {start} model itself"
            )
        result = flat.clone()
        indices, xor = self.read(name)
        result.view(INTEGERS[tensor.element_size()])[indices.long()] ^= xor
        result = result.reshape(changed.shape)
        if digest(name, result).hex() != changed.digests[_other(start)]:
            raise ValueError(f"{self.path} is damaged at {name}: fetch or export it again")
        return result


def _require_tensors(delta: Delta, stored: set[str]) -> None:
    """ValueError unless the header lists what the file holds, in number formats that there are."""
    listed = {name + end for name in delta.changed for end in (INDICES, XOR)}
    unlike = sorted(listed ^ stored)
    if unlike:
        where = "has" if unlike[0] in stored else "lacks"
        raise ValueError(
            f"{delta.path} {where} the tensor {unlike[0]}, against its header: fetch or export it again"
        )
    known = {dtype_name(dtype) for dtype in DTYPES.values()}
    for name, changed in delta.changed.items():
        if changed.dtype not in known:
            raise ValueError(
                f"{delta.path} changes {name} of number format {changed.dtype[:20]!r}, allowed are "
                f"{', '.join(sorted(known))}: fetch or export it again"
            )


def _bits_dtype(dtype: str) -> torch.dtype:
    """The integer type that shows the bits of a number format."""
    return INTEGERS[torch_dtype(dtype).itemsize]


def _other(side: Side) -> Side:
    return Side.trained if side == Side.base else Side.base


def read_delta(path: Path) -> Delta:
    """Open a sparse checkpoint; tensors are read on access.

    Raises ValueError when the file is missing, truncated or not a sparse checkpoint.
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
