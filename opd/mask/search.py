"""From the settings of a rule to the kept indices of every parameter."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from opd.checkpoint.chunks import (
    Chunk,
    ChunkReader,
    Progress,
    binades,
    chunk_values,
    counts_by_binade,
)
from opd.checkpoint.names import place
from opd.checkpoint.tensors import Checkpoint
from opd.config.mask import MaskBudget, MaskRule, MaskStructure, RuleConfig
from opd.mask import rules
from opd.mask.principal import safe
from opd.mask.top_k import Selection, Threshold, TopKQuery, fixed_threshold
from opd.mask.units import UnitSelection

if TYPE_CHECKING:
    from opd.mask.mask import Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Parameters among whose weights the best ``quota`` are kept."""

    names: tuple[str, ...]
    quota: int


class Search:
    """One discovery. ``tied``, ``tied_kept`` and ``warnings`` are complete once ``find`` is exhausted."""

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
        self._scores, source = self._read_scores(spool)
        # masks from different sources have different tie-breaks: their ties must not coincide
        self._salt = f"{rule.seed} {rule.rule.value} {source}"
        self._candidates = tuple(
            name for name in base if not any(fnmatchcase(name, p) for p in rule.exclude)
        )
        for pattern in rule.exclude:
            if not any(fnmatchcase(name, pattern) for name in base):
                self.warnings.append(f"exclude={pattern} matches no parameter")

    def find(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The kept indices of every parameter, in any order."""
        for name in self._base:
            if name not in self._candidates:
                yield name, torch.zeros(0, dtype=torch.int32)
        if self._like is not None:
            yield from self._copy_counts(self._like)
        elif self._rule.threshold is not None:
            query = TopKQuery(names=self._candidates, quotas=(0,), scores=self._scores)
            yield from self._selection(1).select(query, fixed_threshold(self._rule.threshold))
        else:
            groups = self._groups()
            if self._rule.structure == MaskStructure.coordinates:
                yield from self._select_coordinates(groups)
            else:
                yield from self._select_units(groups)

    def _read_scores(self, spool: Path) -> tuple[ChunkReader | None, str]:
        """The scores of the rule (None when all are equal), and what identifies their source."""
        rule, base = self._rule, self._base
        match rule.rule:
            case MaskRule.delta:
                assert rule.trained is not None
                other = rules.trained_weights(rule.trained)
                return rules.delta(base, other.parameters, rule.trained), other.fingerprint()
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

    def _select_coordinates(self, groups: list[Group]) -> Iterator[tuple[str, torch.Tensor]]:
        selection = self._selection(3 if self._scores is None else 5)
        unchanged = 0
        for group in groups:
            query = TopKQuery(names=group.names, quotas=(group.quota,), scores=self._scores)
            threshold = selection.find_threshold(query)
            self.tied += threshold.tied
            self.tied_kept += threshold.tied_kept
            unchanged += self._count_kept_unchanged(selection, query, threshold)
            yield from selection.select(query, threshold)
        if unchanged:
            self.warnings.append(
                f"density={self._rule.density} asks for more weights than have changed: {unchanged:,} "
                "of the kept ones did not change and were chosen at random; lower the density or use "
                "threshold=1e-5"
            )

    def _count_kept_unchanged(
        self, selection: Selection, query: TopKQuery, threshold: Threshold
    ) -> int:
        zero = int(fixed_threshold(0.0).score[0])
        if self._rule.rule != MaskRule.delta or int(threshold.score[0]) > zero:
            return 0
        assert query.scores is not None
        return query.quotas[0] - selection.count_above(query.names, query.scores, 0.0)

    def _select_units(self, groups: list[Group]) -> Iterator[tuple[str, torch.Tensor]]:
        shapes = self._base.shapes
        selection = UnitSelection(shapes, self._salt, self._rule.structure, self._progress)
        for group in groups:
            yield from selection.select(group.names, group.quota, self._scores)

    def _copy_counts(self, like: "Mask") -> Iterator[tuple[str, torch.Tensor]]:
        """As many weights of each parameter as ``like`` keeps; magnitude_matched: of each binade too."""
        matched = self._rule.rule == MaskRule.magnitude_matched
        selection = self._selection(5 if matched else 3)
        for name in self._base:
            index = like.indices[name]
            quotas, classes = (len(index),), None
            if matched:
                quotas = tuple(counts_by_binade(self._base[name], index).tolist())
                classes = self._binades
            query = TopKQuery(names=(name,), quotas=quotas, classes=classes)
            yield from selection.select(query, selection.find_threshold(query))

    def _binades(self, chunk: Chunk) -> np.ndarray:
        return binades(chunk_values(self._base[chunk.name], chunk))

    def _groups(self) -> list[Group]:
        """Groups of competing parameters, with quotas that add up to the density of the whole model."""
        density, total = self._rule.density, self._base.numel
        assert density is not None
        budget = round(density * total)
        sizes = {name: self._base[name].numel for name in self._candidates}
        if not 0 < budget <= sum(sizes.values()):
            raise ValueError(
                f"density={density} of {total:,} weights is {budget:,}, and "
                f"{sum(sizes.values()):,} are not excluded: allowed is from 1 to as many"
            )
        members: dict[str, list[str]] = {}
        for name in self._candidates:
            members.setdefault(_group_key(self._rule.budget, name), []).append(name)
        quotas = apportion(
            budget, {key: sum(sizes[name] for name in names) for key, names in members.items()}
        )
        return [Group(names=tuple(members[key]), quota=quotas[key]) for key in members]


def apportion(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divide a total in proportion to sizes: rounded down, and one more for the largest remainders."""
    whole = sum(sizes.values())
    quotas = {key: total * size // whole for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: -(total * sizes[key] % whole))
    for key in by_remainder[: total - sum(quotas.values())]:
        quotas[key] += 1
    return quotas


def _group_key(budget: MaskBudget, name: str) -> str:
    match budget:
        case MaskBudget.tensor:
            return name
        case MaskBudget.module:
            return place(name).module
    return ""


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
