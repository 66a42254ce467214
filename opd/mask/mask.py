"""The Mask: for every parameter of one base model the coordinates that are kept for training."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd.checkpoint.writer import write_tensors

FORMAT = "opd-mask-1"
INT32_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a mask comes from.

    ``base`` is the fingerprint of the model it belongs to, ``model`` what that was called, ``command``
    how the mask was made.
    """

    rule: str
    base: str
    model: str
    seed: int = 0
    command: str = ""


class LazyIndices(Mapping[str, torch.Tensor]):
    """Index tensors that are read or computed when asked for, one at a time, and not kept."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """The kept coordinates of every parameter of a base model.

    ``indices`` gives for each parameter's Hugging Face name the sorted flat coordinates [kept],
    int32 (int64 when a tensor has more than 2^31 - 1 elements); ``shapes`` lists the same names. An
    empty tensor freezes a parameter, one with every coordinate trains it whole. A tied head is
    listed once, as the embedding. Masks read from a file or combined hold one tensor at a time.
    """

    indices: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    origin: Origin

    def __post_init__(self) -> None:
        if set(self.indices) != set(self.shapes):
            odd = sorted(set(self.indices) ^ set(self.shapes))[0]
            raise ValueError(f"a mask lists the same names in indices and shapes, found {odd} once")

    def numel(self, name: str) -> int:
        """Coordinates of a parameter, kept or not."""
        return torch.Size(self.shapes[name]).numel()

    def counts(self) -> dict[str, int]:
        """Kept coordinates of each parameter."""
        return {name: len(self.indices[name]) for name in self.shapes}

    @property
    def density(self) -> float:
        """Kept coordinates / all coordinates."""
        return sum(self.counts().values()) / sum(self.numel(name) for name in self.shapes)

    def fingerprint(self) -> str:
        """Hexadecimal digest of names and coordinates: equal for masks that keep the same weights."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            index = self.indices[name].to(torch.int64)
            digest.update(f"{name} {len(index)} ".encode() + index.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def require_base(self, fingerprint: str, model: str) -> None:
        """ValueError unless the mask was made for the model of this fingerprint."""
        if fingerprint != self.origin.base:
            raise ValueError(
                f"the mask was made for {self.origin.model} (fingerprint {self.origin.base[:12]}), "
                f"found {model} (fingerprint {fingerprint[:12]}): use the base it was made for, or "
                "discover a mask for this one"
            )

    def require_parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError unless the mask names exactly these parameters in these shapes."""
        for name in sorted(set(shapes) | set(self.shapes)):
            ours, theirs = self.shapes.get(name), shapes.get(name)
            if ours != theirs:
                raise ValueError(
                    f"the mask does not fit the model: {name} is "
                    f"{list(ours) if ours is not None else 'absent'} in the mask and "
                    f"{list(theirs) if theirs is not None else 'absent'} in the model"
                )

    def union(self, other: "Mask") -> "Mask":
        """Kept by either."""
        return self._combined(other, "union", _union)

    def intersection(self, other: "Mask") -> "Mask":
        """Kept by both."""
        return self._combined(other, "intersection", _intersection)

    def difference(self, other: "Mask") -> "Mask":
        """Kept by this one and not by ``other``."""
        return self._combined(other, "difference", _difference)

    def _combined(self, other: "Mask", word: str, combine: "Combine") -> "Mask":
        other.require_base(self.origin.base, self.origin.model)
        other.require_parameters(self.shapes)
        return replace(
            self,
            indices=LazyIndices(
                self.shapes, lambda name: combine(self.indices[name], other.indices[name])
            ),
            origin=replace(
                self.origin, rule=f"{word}({self.origin.rule}, {other.origin.rule})", command=""
            ),
        )

    def save(self, path: Path) -> None:
        """Write the file, a tensor at a time; it appears whole or not at all."""
        write_mask(path, self.shapes, self.indices.items(), self.origin)


Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def held_by(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which of some sorted coordinates are among other sorted ones, bool."""
    if len(b) == 0:
        return torch.zeros(len(a), dtype=torch.bool)
    at = torch.searchsorted(b, a, out_int32=len(b) <= INT32_MOST).clamp_(max=len(b) - 1)
    return b[at] == a


def _intersection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[held_by(a, b)]


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[~held_by(a, b)]


def _union(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, _difference(b, a)]).sort().values


def index_dtype(shapes: Mapping[str, tuple[int, ...]]) -> torch.dtype:
    """int32, or int64 when a tensor has more than 2^31 - 1 elements."""
    largest = max((torch.Size(shape).numel() for shape in shapes.values()), default=0)
    return torch.int64 if largest > INT32_MOST else torch.int32


def write_mask(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    indices: Iterable[tuple[str, torch.Tensor]],
    origin: Origin,
) -> None:
    """A mask file from (name, sorted flat coordinates) in any order, holding one tensor at a time.

    The file is safetensors: one index tensor a parameter and, as metadata, the origin, every
    parameter's shape and the density.
    """
    dtype = index_dtype(shapes)
    counts: dict[str, int] = {}

    def counted() -> Iterator[tuple[str, torch.Tensor]]:
        for name, index in indices:
            counts[name] = len(index)
            yield name, index.to(dtype)

    def metadata() -> dict[str, str]:
        assert counts.keys() == shapes.keys(), "a mask lists every parameter once"
        total = sum(torch.Size(shape).numel() for shape in shapes.values())
        return {
            "format": FORMAT,
            **{key: str(value) for key, value in asdict(origin).items()},
            "density": repr(sum(counts.values()) / total),
            "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
        }

    write_tensors(path, counted(), metadata)


def read_mask(path: Path) -> Mask:
    """A mask file; index tensors are read when asked for.

    Raises ValueError when the file is missing, is no mask, or holds coordinates that cannot be.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"there is no mask file {path}: make one with `opd mask discover`")
    try:
        opened: Any = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a mask ({error}): make it again") from None
    found = opened.metadata() or {}
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} is no mask file of ours (format {found.get('format')}, expected {FORMAT}): make "
            "one with `opd mask discover`"
        )
    shapes = {name: tuple(shape) for name, shape in json.loads(found["shapes"]).items()}

    def read(name: str) -> torch.Tensor:
        index: torch.Tensor = opened.get_tensor(name)
        require_sound(index, torch.Size(shapes[name]).numel(), f"{name} in {path}")
        return index

    return Mask(
        indices=LazyIndices(opened.keys(), read),
        shapes=shapes,
        origin=Origin(
            rule=found["rule"],
            base=found["base"],
            model=found["model"],
            seed=int(found["seed"]),
            command=found["command"],
        ),
    )


def require_sound(index: torch.Tensor, numel: int, what: str) -> None:
    """ValueError unless these are sorted, distinct flat coordinates of ``numel`` elements."""
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{what} is {list(index.shape)} {index.dtype}: expected flat int32 or int64"
        )
    if len(index) == 0:
        return
    if index[0] < 0 or index[-1] >= numel or not bool((index[1:] > index[:-1]).all()):
        raise ValueError(f"{what} is not a sorted list of coordinates below {numel}: make it again")
