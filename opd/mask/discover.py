"""Discovering the mask of a rule on a base model, and writing it to a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from opd.checkpoint.chunks import Progress, quiet
from opd.checkpoint.tensors import Checkpoint
from opd.config.mask import RuleConfig, require_valid_rule
from opd.mask.file import Origin, write_mask
from opd.mask.search import Search

if TYPE_CHECKING:
    from opd.mask.mask import Mask

MOST_LISTED = 3
"""Tensors that a warning names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result of a discovery: kept weights of each parameter, ties and warnings.

    ``tied`` weights had a score equal to a threshold; ``tied_kept`` of them were kept, at random.
    """

    path: Path
    counts: dict[str, int]
    numel: int
    tied: int = 0
    tied_kept: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Kept weights."""
        return sum(self.counts.values())

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return self.kept / self.numel


def discover_mask(
    base: Checkpoint,
    rule: RuleConfig,
    out: Path,
    *,
    like: "Mask | None" = None,
    command: str = "",
    progress: Progress = quiet,
) -> Summary:
    """Find the mask of a rule and write it to ``out``; equal settings write equal bytes.

    Memory: a few MiB and the indices of one parameter. A rule that scores a live run reads the file
    that the run left, ``rule.scores``; ``like`` is the mask that ``rule.like`` names. Raises
    ValueError for settings that contradict each other, files that do not belong to the base and
    densities that cannot be met.
    """
    require_valid_rule(rule)
    assert (like is None) == (rule.like is None), "like is the mask that rule.like names"
    fingerprint, parameters = base.fingerprint(), base.parameters
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=".discover-") as folder:
        search = Search(parameters, rule, like, fingerprint, Path(folder) / "scores", progress)
        counts: dict[str, int] = {}

        def counted() -> Iterator[tuple[str, torch.Tensor]]:
            for name, index in search.find():
                counts[name] = len(index)
                yield name, index

        origin = Origin(
            rule=rule.rule.value,
            base=fingerprint,
            model=base.model,
            seed=rule.seed,
            command=command,
        )
        write_mask(out, parameters.shapes, counted(), origin)
        return Summary(
            path=out,
            counts={name: counts[name] for name in parameters},
            numel=parameters.numel,
            tied=search.tied,
            tied_kept=search.tied_kept,
            warnings=(*search.warnings, *_left_out(base, parameters)),
        )


def _left_out(base: Checkpoint, parameters: Checkpoint) -> list[str]:
    """A warning that counts the tensors of a base that no training can change."""
    names = [name for name in base if name not in parameters]
    if not names:
        return []
    listed = ", ".join(names[:MOST_LISTED]) + (", ..." if names[MOST_LISTED:] else "")
    return [f"{len(names)} stored tensors are no parameters of the model: {listed}"]
