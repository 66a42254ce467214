"""The Mask: for every parameter of one base model the coordinates that are kept for training."""

import hashlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from opd.checkpoint.chunks import Progress, quiet
from opd.checkpoint.tensors import open_checkpoint
from opd.config.arguments import parse_arguments
from opd.config.mask import MaskRule, RuleConfig, require_valid_rule
from opd.mask.discover import discover_mask
from opd.mask.file import INT32_MOST, LazyIndices, Origin, read_mask_file, write_mask


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

    @classmethod
    def read(cls, path: str | Path) -> "Mask":
        """A mask file; index tensors are read when asked for.

        Raises ValueError when the file is missing, is not a mask, or holds impossible coordinates.
        """
        indices, shapes, origin = read_mask_file(Path(path))
        return cls(indices=indices, shapes=shapes, origin=origin)

    @classmethod
    def discover(
        cls,
        base: str | Path,
        rule: str = MaskRule.delta,
        *,
        out: str | Path | None = None,
        progress: Progress = quiet,
        **settings: Any,
    ) -> "Mask":
        """The mask of a rule on the model ``base`` (folder or Hub id), written to ``out`` if given.

        ``rule`` and ``settings`` are those of ``RuleConfig``: rule="near_zero", density=0.1. Without
        ``out`` the indices are held in memory. Raises ValueError for settings that are unknown or
        contradict each other, files that do not belong to the base and densities that cannot be met.
        """
        words = {"rule": rule, **settings}.items()
        config = parse_arguments(
            RuleConfig, [f"{key}={'null' if value is None else value}" for key, value in words]
        )
        require_valid_rule(config)
        like = None if config.like is None else cls.read(config.like)
        checkpoint = open_checkpoint(str(base))
        with TemporaryDirectory(prefix="opd-mask-") as folder:
            file = Path(folder, "mask.safetensors") if out is None else Path(out)
            summary = discover_mask(checkpoint, config, file, like=like, progress=progress)
            for warning in summary.warnings:
                warnings.warn(warning, stacklevel=2)
            found = cls.read(file)
            if out is not None:
                return found
            return replace(found, indices={name: i.clone() for name, i in found.indices.items()})

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

    def save(self, path: str | Path) -> None:
        """Write the file, a tensor at a time; it appears whole or not at all."""
        write_mask(Path(path), self.shapes, self.indices.items(), self.origin)


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
