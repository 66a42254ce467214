"""``sync``: the learner's weights on their way into the rollout engine."""

from dataclasses import dataclass

from opd.config.fields import bounded
from opd.config.train import Precision

# Mean nats. Measured on SmolLM2-135M, 30 layers, bf16 on both sides: 0.034, with weight noise 0.048;
# each side is 0.022-0.039 from float32. A tied head that was not packed again makes about 1.
DEFAULT_MAX_GAP = {Precision.fp32: 1e-3, Precision.bf16: 0.15, Precision.pure_bf16: 0.15}
LEAST_BF16_GAP = 0.02
"""No bound in bf16 is below it."""
ROUNDINGS = 6.0
"""A bound in bf16, in units of the rounding of a learner with float32 weights, which is 0.0156 nats on
SmolLM2-135M; a model all in bf16, as the engine's is, has 0.033."""
GROWTH = 5.0
"""How much larger than at the start the gap of a step may be in bf16."""


def gap_bound(precision: Precision, rounding: float | None) -> float:
    """The largest allowed mean gap in nats; ``rounding`` is that of the learner in bf16, if measured."""
    most = DEFAULT_MAX_GAP[precision]
    return most if rounding is None else min(most, max(LEAST_BF16_GAP, ROUNDINGS * rounding))


def watched_bound(precision: Precision, bound: float, first: float) -> float:
    """The largest allowed gap of a step, from the ``bound`` of checks and the gap at the start."""
    if precision == Precision.fp32:
        return bound
    return min(bound, max(LEAST_BF16_GAP, GROWTH * first))


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """The learner's weights are sent to the rollout engine after every step."""

    verify_every: int = bounded(25, least=0)
    """Steps between comparisons of the engine's log-probs with the learner's; 0 only at the start."""
    max_gap: float | None = bounded(None, above=0)
    """Largest mean difference in nats before the run stops; by default 1e-3 in fp32, measured in bf16."""
    snapshot_every: int = bounded(50, least=1)
    """rollout=server: every so many pushes all weights are sent, otherwise only the changed ones."""
