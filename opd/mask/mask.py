"""The Mask: for every parameter of one base model, the indices of the weights that are trained."""

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
from opd.mask.file import INT32_MAX, LazyIndices, Origin, read_mask_file, write_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Mask:
    """The kept weights of every parameter of a base model.

    ``indices`` maps each parameter's Hugging Face name to its sorted flat indices [kept], int32 (int64
    when a tensor has more than 2^31 - 1 elements); ``shapes`` lists the same names. An empty tensor
    freezes a parameter, a full one trains all of it. A tied head is listed once, as the embedding.
    Masks that are read from a file or combined read their index tensors on access.
    """

    indices: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    origin: Origin

    @classmethod
    def read(cls, path: str | Path) -> "Mask":
        """Open a mask file; index tensors are read on access.

        Raises ValueError when the file is missing, is not a mask, or holds impossible indices.
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
        """Number of weights of a parameter."""
        return torch.Size(self.shapes[name]).numel()

    def counts(self) -> dict[str, int]:
        """Number of kept weights of each parameter."""
        return {name: len(self.indices[name]) for name in self.shapes}

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return sum(self.counts().values()) / sum(self.numel(name) for name in self.shapes)

    def fingerprint(self) -> str:
        """Hexadecimal digest of names and indices: equal for masks that keep the same weights."""
        digest = hashlib.sha256()
        for name in sorted(self.shapes):
            index = self.indices[name].to(torch.int64)
            digest.update(f"{name} {len(index)} ".encode() + index.cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def require_base(self, fingerprint: str, model: str) -> None:
        """ValueError unless the mask was made for the model with this fingerprint."""
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
        """The weights that either mask keeps."""
        return self._combine(other, "union", _union)

    def intersection(self, other: "Mask") -> "Mask":
        """The weights that both masks keep."""
        return self._combine(other, "intersection", _intersection)

    def difference(self, other: "Mask") -> "Mask":
        """The weights that this mask keeps and ``other`` does not."""
        return self._combine(other, "difference", _difference)

    def _combine(self, other: "Mask", operation: str, combine: "Combine") -> "Mask":
        other.require_base(self.origin.base, self.origin.model)
        other.require_parameters(self.shapes)
        return replace(
            self,
            indices=LazyIndices(
                self.shapes, lambda name: combine(self.indices[name], other.indices[name])
            ),
            origin=replace(
                self.origin,
                rule=f"{operation}({self.origin.rule}, {other.origin.rule})",
                command="",
            ),
        )

    def save(self, path: str | Path) -> None:
        """Write the mask file, a tensor at a time; it appears complete or not at all."""
        write_mask(Path(path), self.shapes, self.indices.items(), self.origin)


Combine = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def isin_sorted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements of ``a`` are in ``b``, both sorted; bool [len(a)]."""
    if len(b) == 0:
        return torch.zeros(len(a), dtype=torch.bool)
    positions = torch.searchsorted(b, a, out_int32=len(b) <= INT32_MAX).clamp_(max=len(b) - 1)
    return b[positions] == a


def _intersection(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[isin_sorted(a, b)]


def _difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a[~isin_sorted(a, b)]


def _union(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, _difference(b, a)]).sort().values
