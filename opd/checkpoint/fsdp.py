"""FSDP checkpoints with one file a rank: ``model_world_size_4_rank_0.pt``, ...

Each file holds a dictionary of DTensors: this rank's shard and its placement. The files are read by
torch's restricted unpickler (``weights_only``), with empty stand-ins for the classes that describe
placements: no code of the file runs, no process group is needed, and files of older torch versions,
which kept these classes in other modules, are read as well.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PATTERN = "model_world_size_*_rank_*.pt"
_NAME = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt$")
_TENSOR = "DTensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharded:
    """A tensor in shards, one a rank, split along ``dim``; a single one where nothing was split."""

    parts: tuple[torch.Tensor, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        shape = list(self.parts[0].shape)
        if len(self.parts) > 1:
            shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    def whole(self) -> torch.Tensor:
        """The shards concatenated."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, self.dim)


def shard_files(folder: Path) -> list[Path]:
    """The files of all ranks, in order; empty without any. ValueError when a rank's file is missing."""
    found = {file.name: file for file in folder.glob(PATTERN) if _NAME.match(file.name)}
    if not found:
        return []
    sizes = {int(_NAME.match(name)[1]) for name in found}  # pyright: ignore[reportOptionalSubscript]
    if len(sizes) > 1:
        raise ValueError(
            f"{folder} holds shards of runs with {' and '.join(map(str, sorted(sizes)))} ranks: "
            "keep those of one"
        )
    size = sizes.pop()
    expected = [f"model_world_size_{size}_rank_{rank}.pt" for rank in range(size)]
    missing = [name for name in expected if name not in found]
    if missing:
        raise ValueError(
            f"{folder} lacks the shard {missing[0]}: fetch it from that rank's machine"
        )
    return [found[name] for name in expected]


def read_shards(files: Sequence[Path]) -> dict[str, Sharded]:
    """Tensors by name from all ranks' files, memory-mapped. ValueError for other placements than FSDP's."""
    states = [_state(file) for file in files]
    return {name: _join(name, [state[name] for state in states]) for name in states[0]}


class _Pickled:
    """An unpickled object's state as attributes."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        match state:
            case (attributes, slots):
                self.__dict__.update((attributes or {}) | (slots or {}))
            case dict():
                self.__dict__.update(state)
            case _:
                self.args = state


class _LocalTensor(torch.Tensor):
    """Stand-in for DTensor: the unpickler sets ``_local_tensor`` and ``_spec``."""

    @classmethod
    def __torch_dispatch__(cls, *arguments: Any) -> Any:
        raise TypeError("a stand-in for DTensor cannot be computed with")


def _state(file: Path) -> dict[str, Any]:
    """The dictionary of a rank; ``weights_only`` refuses classes that do not describe a placement."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(file))
    allowed: list[Any] = [
        (_stand_in(name), name) for name in names if name.split(".")[:2] == ["torch", "distributed"]
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _stand_in(name: str) -> type:
    last = name.rpartition(".")[2]
    return _LocalTensor if last == _TENSOR else type(last, (_Pickled,), {})


def _join(name: str, parts: list[Any]) -> Sharded:
    """One tensor from the shards of all ranks."""
    if type(parts[0]) in (torch.Tensor, torch.nn.Parameter):
        return Sharded(parts=(parts[0].detach(),), dim=0)
    placements = {tuple(_placement(p) for p in part._spec.placements) for part in parts}
    local = tuple(part._local_tensor.detach() for part in parts)
    match list(placements):
        case [(("Replicate", _),)]:
            return Sharded(parts=local[:1], dim=0)
        case [(("Shard", int(dim)),)]:
            joined = Sharded(parts=local, dim=dim)
        case _:
            kinds = "; ".join(
                " x ".join(kind for kind, _ in each) for each in sorted(placements, key=str)
            )
            raise ValueError(
                f"{name} is sharded as {kinds}: only one Shard or Replicate is supported; merge the "
                "shards first"
            )
    if joined.shape != tuple(parts[0].shape):
        raise ValueError(
            f"the shards of {name} make {list(joined.shape)}, and belong to a tensor of "
            f"{list(parts[0].shape)}: some are from another run"
        )
    return joined


def _placement(placement: Any) -> tuple[str, Any]:
    """A placement's kind, and the dimension that it splits."""
    kind = type(placement).__name__
    if kind != "Shard":
        return kind, None
    return kind, placement.dim
