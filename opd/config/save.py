"""``save``: checkpoints."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.config.fields import bounded

if TYPE_CHECKING:
    from opd.config.schema import Config


@dataclass(kw_only=True, slots=True)
class SaveConfig:
    """Which checkpoints are kept."""

    every: int = bounded(50, least=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep: int = bounded(2, least=1)
    """Number of newest checkpoints to keep."""
    keep_best: str | None = None
    """Also keep the best checkpoint by accuracy, mean_at_k, reverse_kl, or max:NAME, min:NAME of a metric."""
    disk_check: bool = True
    """Refuse a run whose checkpoints do not fit on the disk by forecast."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestMetric:
    """The metric that decides which checkpoint is best, and whether its highest value is."""

    name: str
    highest: bool


EVALUATED = {"accuracy": True, "mean_at_k": True, "reverse_kl": False}
"""Metrics of the evaluation that have a short name, and whether higher is better."""


def best_metric(config: "Config") -> BestMetric | None:
    """The metric of ``save.keep_best``; None where no checkpoint is kept as the best."""
    given = config.save.keep_best
    if given is None:
        return None
    if given in EVALUATED:
        return BestMetric(name=f"eval/{config.eval.task}/{given}", highest=EVALUATED[given])
    direction, _, name = given.partition(":")
    return BestMetric(name=name, highest=direction == "max")


def best_checkpoint_has_a_metric(config: "Config") -> str | None:
    """A metric without a direction, or one that the run does not measure, keeps nothing."""
    given = config.save.keep_best
    if given is None:
        return None
    direction, colon, name = given.partition(":")
    if given not in EVALUATED and not (colon and name and direction in ("max", "min")):
        return (
            f"save.keep_best={given}: allowed are {', '.join(EVALUATED)}, and max:NAME or min:NAME with the "
            "name of a metric in metrics.jsonl"
        )
    if given in EVALUATED and config.data.eval is None:
        return f"save.keep_best={given} needs an evaluation: set data.eval, or another metric"
    return None


RULES = (best_checkpoint_has_a_metric,)
