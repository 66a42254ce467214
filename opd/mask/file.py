"""The mask file: safetensors with one index tensor a parameter and the origin of the mask."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Json
from safetensors import SafetensorError, safe_open

from opd.checked_json import TensorShape, read_texts
from opd.checkpoint.writer import write_tensors

FORMAT = "opd-mask-1"
RUN_MASK = "mask.safetensors"
"""File in a run folder that holds the mask of the run."""
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a mask comes from.

    ``base`` is the fingerprint of its base model, ``model`` that model's name, ``command`` the command
    that made the mask.
    """

    rule: str
    base: str
    model: str
    seed: int = 0
    command: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class _MaskMetadata:
    """What the header of a mask file says besides its format."""

    rule: str
    base: str
    model: str
    seed: int
    command: str
    shapes: Json[dict[str, TensorShape]]
    sha256: Json[dict[str, str]] | None = None


class LazyIndices(Mapping[str, torch.Tensor]):
    """Index tensors that are read or computed on access and not cached."""

    def __init__(self, names: Iterable[str], read: Callable[[str], torch.Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def index_dtype(shapes: Mapping[str, tuple[int, ...]]) -> torch.dtype:
    """int32, or int64 when a tensor has more than 2^31 - 1 elements."""
    largest = max((torch.Size(shape).numel() for shape in shapes.values()), default=0)
    return torch.int64 if largest > INT32_MAX else torch.int32


def write_mask(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    indices: Iterable[tuple[str, torch.Tensor]],
    origin: Origin,
) -> None:
    """Write a mask file from (name, sorted flat indices) in any order, one tensor at a time.

    The file is safetensors: one index tensor a parameter and, as metadata, the origin, every
    parameter's shape, the density and the checksum of each index tensor.
    """
    dtype = index_dtype(shapes)
    counts: dict[str, int] = {}
    sums: dict[str, str] = {}

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, index in indices:
            counts[name], stored = len(index), index.to(dtype)
            sums[name] = _checksum(stored)
            yield name, stored

    def metadata() -> dict[str, str]:
        assert counts.keys() == shapes.keys(), "a mask lists every parameter once"
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        return {
            "format": FORMAT,
            **{key: str(value) for key, value in asdict(origin).items()},
            "density": repr(sum(counts.values()) / total),
            "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
            "sha256": json.dumps(sums),
        }

    write_tensors(path, counted(), metadata)


def read_mask_file(
    path: Path,
) -> tuple[LazyIndices, dict[str, tuple[int, ...]], Origin]:
    """Indices, shapes and origin of a mask file; index tensors are read on access.

    Raises ValueError when the file is missing, is not a mask, or holds impossible coordinates.
    """
    if not path.is_file():
        raise ValueError(f"there is no mask file {path}: make one with `opd mask discover`")
    try:
        opened: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a mask ({error}): make it again") from None
    found = opened.metadata() or {}
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not an opd mask file (format {found.get('format')}, expected {FORMAT}): make "
            "one with `opd mask discover`"
        )
    about = read_texts(found, _MaskMetadata, path, "make the mask again with `opd mask discover`")
    shapes, sums = about.shapes, about.sha256
    unlike = sorted(shapes.keys() ^ set(opened.keys()))
    if unlike:
        raise ValueError(
            f"{path} lists {unlike[0]} either as a shape or as a tensor, not as both: make it again"
        )

    def read(name: str) -> torch.Tensor:
        index: torch.Tensor = opened.get_tensor(name)
        require_indices(index, torch.Size(shapes[name]).numel(), f"{name} in {path}")
        if sums is not None and _checksum(index) != sums.get(name):
            raise ValueError(f"{path} is damaged at {name}: fetch it again, or make it again")
        return index

    origin = Origin(
        rule=about.rule,
        base=about.base,
        model=about.model,
        seed=about.seed,
        command=about.command,
    )
    return LazyIndices(opened.keys(), read), shapes, origin


def _checksum(index: torch.Tensor) -> str:
    """Hexadecimal digest of an index tensor's bytes."""
    return hashlib.sha256(index.contiguous().numpy().data).hexdigest()[:32]


def require_indices(index: torch.Tensor, numel: int, source: str) -> None:
    """ValueError unless these are sorted, distinct flat indices of ``numel`` elements."""
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{source} is {list(index.shape)} {index.dtype}: expected flat int32 or int64"
        )
    if len(index) == 0:
        return
    if index[0] < 0 or index[-1] >= numel or not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"{source} is not a sorted list of indices below {numel}: make it again")
