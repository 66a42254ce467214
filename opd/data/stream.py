"""The order of training prompts: a pure function of seed and step, so nothing is saved for a resume."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from opd.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptGroup:
    """``size`` consecutive prompts of one source, and their weight in every step; None: one pool."""

    name: str
    size: int
    weight: float | None = None


class ShuffledPrompts:
    """A ``PromptStream``: a new permutation for each epoch, in batches of ``per_step`` prompts.

    The global batch of a step depends only on ``seed`` and ``step``. Rank r takes every ``size``-th
    prompt of it, starting at r, so the shares of ranks differ by at most one prompt (a share is empty
    where ``size`` exceeds ``per_step``). No prompt occurs twice in one batch: the prompts left over
    at the end of an epoch, fewer than a batch and others each time, are skipped in it.

    ``groups``: those with weights get their share of every step, rounded so that the total of all
    steps is right to one prompt, and each has epochs of its own. Without weights all prompts are one
    group.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        per_step: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        groups: Sequence[PromptGroup] = (),
    ) -> None:
        assert 0 <= rank < size
        if not 0 < per_step <= len(prompts):
            raise ValueError(
                f"found train.prompts_per_step={per_step}; allowed: 1 to {len(prompts)}, the "
                "number of training prompts; lower it or add prompts"
            )
        weighted = [group for group in groups if group.weight is not None]
        assert not weighted or sum(group.size for group in weighted) == len(prompts)
        self._prompts = prompts
        self._rank = rank
        self._size = size
        self._schedule = _Schedule(
            weighted or [PromptGroup(name="", size=len(prompts), weight=1.0)], per_step
        )
        self._orders = [_Order(group, seed) for group in range(len(weighted) or 1)]

    def take(self, step: int) -> list[Prompt]:
        """This rank's prompts of optimizer step ``step`` (from 0)."""
        whole = [
            order.places(part)
            for order, part in zip(self._orders, self._schedule.parts(step), strict=True)
        ]
        return [self._prompts[place] for place in np.concatenate(whole)[self._rank :: self._size]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """``count`` places of a group from ``at`` on, in the order of its ``epoch``."""

    start: int
    size: int
    epoch: int
    at: int
    count: int


class _Schedule:
    """How many prompts of each group a step has, and where in the group's epoch they begin."""

    def __init__(self, groups: Sequence[PromptGroup], per_step: int) -> None:
        self._sizes = [group.size for group in groups]
        self._per_step = per_step
        weights = [group.weight or 0.0 for group in groups]
        self._shares = [weight / math.fsum(weights) for weight in weights]
        for group, share in zip(groups, self._shares, strict=True):
            if share * per_step > group.size:
                raise ValueError(
                    f"data.train: the weight of {group.name} asks for {share * per_step:g} of "
                    f"train.prompts_per_step={per_step} prompts, and it has {group.size}; lower the weight, "
                    "or train.prompts_per_step"
                )
        self._restart()

    def _restart(self) -> None:
        self._step = 0
        self._due = [0.0] * len(self._sizes)
        self._epochs = [0] * len(self._sizes)
        self._at = [0] * len(self._sizes)
        self._counts = self._next_counts()

    def parts(self, step: int) -> list[_Part]:
        """The part of each group in ``step``; a later step than the last one continues from there."""
        if step < self._step:
            self._restart()
        while self._step < step:
            self._at = [at + count for at, count in zip(self._at, self._counts, strict=True)]
            self._counts = self._next_counts()
            self._step += 1
        starts = np.cumsum([0, *self._sizes]).tolist()
        columns = zip(starts, self._sizes, self._epochs, self._at, self._counts, strict=False)
        return [
            _Part(start=start, size=size, epoch=epoch, at=at, count=count)
            for start, size, epoch, at, count in columns
        ]

    def _next_counts(self) -> list[int]:
        """The counts of the next step: each prompt is of the group that is furthest behind its share."""
        counts = [0] * len(self._sizes)
        if len(counts) == 1:
            counts = [self._per_step]
        for _ in range(self._per_step if len(counts) > 1 else 0):
            self._due = [due + share for due, share in zip(self._due, self._shares, strict=True)]
            open_ = [g for g, size in enumerate(self._sizes) if counts[g] < size]
            chosen = max(open_, key=self._due.__getitem__)
            self._due[chosen] -= 1
            counts[chosen] += 1
        for group, count in enumerate(counts):
            if self._at[group] + count > self._sizes[group]:
                self._epochs[group] += 1
                self._at[group] = 0
        return counts


class _Order:
    """The permutations of one group, of which the last one is kept."""

    def __init__(self, group: int, seed: int) -> None:
        self._entropy = [seed] if group == 0 else [seed, group]
        self._last: tuple[int, npt.NDArray[np.int64]] | None = None

    def places(self, part: _Part) -> npt.NDArray[np.int64]:
        """The places of a part in the list of all prompts."""
        if self._last is None or self._last[0] != part.epoch:
            seed, *group = self._entropy
            seeded = np.random.Philox(np.random.SeedSequence([seed, part.epoch, *group]))
            order = np.random.Generator(seeded).permutation(part.size)
            self._last = (part.epoch, order)
        return part.start + self._last[1][part.at : part.at + part.count]
