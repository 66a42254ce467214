"""From the settings of a rule to the kept coordinates of every parameter."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from opd.checkpoint.chunks import Chunk, Progress, binades, chunk_values, counts_by_binade
from opd.checkpoint.names import place
from opd.checkpoint.tensors import Checkpoint
from opd.config.mask import MaskBudget, MaskRule, MaskStructure, RuleConfig
from opd.mask import rules
from opd.mask.principal import safe
from opd.mask.top_k import Read, Selection, Threshold, TopKQuery, cut_at
from opd.mask.units import UnitSelection

if TYPE_CHECKING:
    from opd.mask.mask import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters whose weights compete for ``quota`` places."""

    names: tuple[str, ...]
    quota: int


class Search:
    """One discovery. ``tied``, ``tied_kept`` and ``warnings`` are complete once ``kept`` is through."""

    def __init__(
        self,
        base: Checkpoint,
        rule: RuleConfig,
        like: "Mask | None",
        fingerprint: str,
        spool: Path,
        progress: Progress,
    ) -> None:
        self.tied = 0
        self.tied_kept = 0
        self.warnings: list[str] = []
        self._base = base
        self._rule = rule
        self._progress = progress
        self._like = like
        if self._like is not None:
            self._like.require_base(fingerprint, base.model)
            self._like.require_parameters(base.shapes)
        self._scores, source = self._ranking(spool)
        # masks of other sources draw other tiebreak: their ties must not coincide
        self._salt = f"{rule.seed} {rule.rule.value} {source}"
        self._open = tuple(
            name for name in base if not any(fnmatchcase(name, p) for p in rule.exclude)
        )
        for pattern in rule.exclude:
            if not any(fnmatchcase(name, pattern) for name in base):
                self.warnings.append(f"exclude={pattern} matches no parameter")

    def kept(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Kept coordinates of every parameter, in any order."""
        for name in self._base:
            if name not in self._open:
                yield name, torch.zeros(0, dtype=torch.int32)
        if self._like is not None:
            yield from self._as_in(self._like)
        elif self._rule.threshold is not None:
            query = TopKQuery(names=self._open, quotas=(0,), scores=self._scores)
            yield from self._selection(1).kept(query, cut_at(self._rule.threshold))
        else:
            groups = self._groups()
            if self._rule.structure == MaskStructure.coordinates:
                yield from self._coordinates(groups)
            else:
                yield from self._units(groups)

    def _ranking(self, spool: Path) -> tuple[Read | None, str]:
        """The scores of the rule, None when all are equal, and what else they come from."""
        rule, base = self._rule, self._base
        match rule.rule:
            case MaskRule.delta:
                assert rule.trained is not None
                other = rules.trained_weights(rule.trained)
                return rules.delta(base, other, rule.trained), other.fingerprint()
            case MaskRule.near_zero:
                return rules.near_zero(base), ""
            case MaskRule.safe:
                return safe(base, rule.rank_share, spool, self._progress), ""
            case MaskRule.function:
                assert rule.function is not None
                read = rules.function(base, rule.function, spool, self._progress)
                return read, rule.function
            case MaskRule.random | MaskRule.magnitude_matched:
                return None, "" if rule.like is None else _digest(Path(rule.like))
            case _:
                assert rule.scores is not None
                return rules.scores(base, rule.scores), _digest(Path(rule.scores))

    def _selection(self, passes: int) -> Selection:
        shapes = self._base.shapes
        return Selection(shapes, self._salt, passes=passes, progress=self._progress)

    def _coordinates(self, groups: list[Group]) -> Iterator[tuple[str, torch.Tensor]]:
        selection = self._selection(3 if self._scores is None else 5)
        unmoved = 0
        for group in groups:
            query = TopKQuery(names=group.names, quotas=(group.quota,), scores=self._scores)
            cut = selection.cut(query)
            self.tied += cut.tied
            self.tied_kept += cut.tied_kept
            unmoved += self._kept_unmoved(selection, query, cut)
            yield from selection.kept(query, cut)
        if unmoved:
            self.warnings.append(
                f"density={self._rule.density} asks for more weights than have changed: {unmoved:,} of "
                "the kept ones did not change and were drawn by the seed; lower the density or use "
                "threshold=1e-5"
            )

    def _kept_unmoved(self, selection: Selection, query: TopKQuery, cut: Threshold) -> int:
        zero = int(cut_at(0.0).score[0])
        if self._rule.rule != MaskRule.delta or int(cut.score[0]) > zero:
            return 0
        assert query.scores is not None
        return query.quotas[0] - selection.count_above(query.names, query.scores, 0.0)

    def _units(self, groups: list[Group]) -> Iterator[tuple[str, torch.Tensor]]:
        shapes = self._base.shapes
        search = UnitSelection(shapes, self._salt, self._rule.structure, self._progress)
        for group in groups:
            yield from search.kept(group.names, group.quota, self._scores)

    def _as_in(self, like: "Mask") -> Iterator[tuple[str, torch.Tensor]]:
        """As many of each parameter as in another mask; matched, as many of each of its binades."""
        matched = self._rule.rule == MaskRule.magnitude_matched
        selection = self._selection(5 if matched else 3)
        for name in self._base:
            index = like.indices[name]
            quotas, classes = (len(index),), None
            if matched:
                quotas = tuple(counts_by_binade(self._base[name], index).tolist())
                classes = self._binades
            query = TopKQuery(names=(name,), quotas=quotas, classes=classes)
            yield from selection.kept(query, selection.cut(query))

    def _binades(self, chunk: Chunk) -> np.ndarray:
        return binades(chunk_values(self._base[chunk.name], chunk))

    def _groups(self) -> list[Group]:
        """Who competes with whom, for places that add up to the density of the whole model."""
        density, total = self._rule.density, self._base.numel
        assert density is not None
        wanted = round(density * total)
        sizes = {name: self._base[name].numel for name in self._open}
        if not 0 < wanted <= sum(sizes.values()):
            raise ValueError(
                f"density={density} of {total:,} weights is {wanted:,}, and "
                f"{sum(sizes.values()):,} are not excluded: allowed is from 1 to as many"
            )
        members: dict[str, list[str]] = {}
        for name in self._open:
            members.setdefault(_competition(self._rule.budget, name), []).append(name)
        quotas = shared_out(
            wanted, {key: sum(sizes[name] for name in names) for key, names in members.items()}
        )
        return [Group(names=tuple(members[key]), quota=quotas[key]) for key in members]


def shared_out(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """A total in proportion to sizes: rounded down, and one more to the largest remainders."""
    whole = sum(sizes.values())
    quotas = {key: total * size // whole for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: -(total * sizes[key] % whole))
    for key in by_remainder[: total - sum(quotas.values())]:
        quotas[key] += 1
    return quotas


def _competition(budget: MaskBudget, name: str) -> str:
    match budget:
        case MaskBudget.tensor:
            return name
        case MaskBudget.module:
            return place(name).module
    return ""


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
