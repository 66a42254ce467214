"""Tensors as files hold them: safetensors, ``.bin`` and FSDP shards, each read when it is needed."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from opd.checkpoint.files import WeightFiles
from opd.checkpoint.fsdp import read_shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint; ``read`` returns it on the CPU, as stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by their names in safetensors."""


def read_files(found: WeightFiles) -> dict[str, Stored]:
    """The tensors of a model's files.

    Raises ValueError for a file that is truncated, an index whose tensors are not in its shards, and
    two shards that hold different tensors under one name (the same tensor twice is read once).
    """
    if found.are_fsdp_shards:
        return _fsdp_tensors(found.files)
    tensors: dict[str, Stored] = {}
    holders: dict[str, Path] = {}
    for file in found.files:
        for name, stored in read_file(file).items():
            if name in tensors and not _is_same(tensors[name], stored):
                raise ValueError(
                    f"{holders[name]} and {file.name} hold different tensors {name}: remove the file "
                    "that is not of this model"
                )
            tensors[name], holders[name] = stored, file
    for name, shard in found.weight_map.items():
        if name not in tensors:
            raise ValueError(
                f"{found.files[0].parent / shard} lacks {name}, which the index places there: fetch "
                "both again"
            )
    return tensors


def read_file(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors or ``.bin`` file. Raises ValueError when it cannot be read."""
    try:
        return _bin_tensors(file) if file.suffix == ".bin" else _safetensors(file)
    except Exception as error:  # each format raises its own kind for a truncated file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{file} cannot be read ({first}): fetch it again") from error


def is_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold equal values in one format; NaN equals nothing."""
    return a.dtype == b.dtype and torch.equal(a, b)


def _is_same(a: Stored, b: Stored) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and is_equal(a.read(), b.read())


def _safetensors(file: Path) -> dict[str, Stored]:
    opened: Any = safe_open(file, framework="pt")
    return {name: _slice(file, opened, name) for name in opened.keys()}  # noqa: SIM118  (no mapping)


def _slice(file: Path, opened: Any, name: str) -> Stored:
    part = opened.get_slice(name)
    if part.get_dtype() not in DTYPES:
        raise ValueError(f"{name} is stored as {part.get_dtype()}, a format that opd cannot read")
    return Stored(
        shape=tuple(part.get_shape()),
        dtype=DTYPES[part.get_dtype()],
        read=lambda: opened.get_tensor(name),
    )


def _bin_tensors(file: Path) -> dict[str, Stored]:
    # files of before torch 1.6 are no zip archives, and cannot be mapped
    is_mapped = zipfile.is_zipfile(file)
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=is_mapped)
    strange = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strange:
        raise ValueError(f"{strange[0]} is a {type(state[strange[0]]).__name__}, not a tensor")
    return {
        name: Stored(shape=tuple(t.shape), dtype=t.dtype, read=lambda t=t: t)
        for name, t in state.items()
    }


def _fsdp_tensors(files: Sequence[Path]) -> dict[str, Stored]:
    try:
        tensors = read_shards(files)
    except ValueError:
        raise
    except Exception as error:  # truncated files and files with code raise many kinds
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the shards in {files[0].parent} cannot be read ({first})") from error
    return {
        name: Stored(shape=t.shape, dtype=t.parts[0].dtype, read=t.whole)
        for name, t in tensors.items()
    }
