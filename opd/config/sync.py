"""``sync``: the learner's weights on their way into the rollout engine."""

from dataclasses import dataclass

from opd.config.fields import bounded


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """The learner's weights are sent to the rollout engine after every step."""

    verify_every: int = bounded(25, least=0)
    """Steps between comparisons of the engine's log-probs with the learner's; 0 only at the start."""
    max_gap: float | None = bounded(None, above=0)
    """Largest mean difference in nats before the run stops; by default 1e-3 in fp32, 0.15 in bf16."""
    snapshot_every: int = bounded(50, least=1)
    """rollout=server: every so many pushes all weights are sent, otherwise only the changed ones."""
