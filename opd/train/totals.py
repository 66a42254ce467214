"""Metrics of a step, added up over micro-batches and ranks."""

from collections import defaultdict
from collections.abc import Sequence

from opd.batch import Batch, LossOutput
from opd.world import World


class Totals:
    """Sums and maxima of metrics over the micro-batches of a rank; ranks are reduced at the end.

    Sums of each of ``teachers`` are also kept separately, as ``teacher/<name>/<metric>``.
    """

    def __init__(self, teachers: Sequence[str] = ()) -> None:
        self._teachers = teachers
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._maxima: dict[str, float] = {}

    def add(self, out: LossOutput, batch: Batch) -> None:
        """Add a micro-batch."""
        sums = {name: float(value) for name, value in out.sums.items()}
        for name, value in {**sums, "loss/total": float(out.total.detach())}.items():
            self._sums[name] += value
        for name, value in out.counts.items():
            self._counts[name] += float(value)
        for name, value in out.maxima.items():
            self._maxima[name] = max(self._maxima.get(name, float("-inf")), float(value))
        for teacher in self._teachers:
            scored_it = batch.teacher == teacher
            for name, value in sums.items():
                if name.startswith(("loss/", "teacher/")):
                    key = f"teacher/{teacher}/{name.rpartition('/')[2]}"
                    self._sums[key] += value if scored_it else 0.0
                    count = float(out.counts.get(name, batch.tokens))
                    self._counts[key] += count if scored_it else 0.0

    def per_token(self, world: World, *, tokens: float, denominator: float) -> dict[str, float]:
        """Means over the tokens of all ranks, and maxima; metrics with a count of 0 are left out."""
        counts = world.sum(self._counts)
        sums = world.sum(self._sums)
        total = sums.pop("loss/total")
        means = {
            name: value / counts.get(name, tokens)
            for name, value in sums.items()
            if counts.get(name, tokens)
        }
        return {"loss/total": total / denominator, **means, **world.max(self._maxima)}
