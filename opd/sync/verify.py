"""Check that the engine holds the learner's weights: both score the same tokens."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd.interfaces import RolloutEngine, StudentScorer
from opd.types import Prompt, Sampling
from opd.world import World


class SyncMismatch(RuntimeError):
    """Engine and learner disagree by more than numerical noise."""


class SyncCheck:
    """A few sampled tokens, scored by both; a mean gap above ``bound`` nats stops the run."""

    def __init__(
        self,
        engine: RolloutEngine,
        learner: StudentScorer,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        bound: float,
        world: World,
    ) -> None:
        self._engine = engine
        self._learner = learner
        self._prompts = prompts
        self._sampling = replace(
            sampling, n=1, max_tokens=min(16, sampling.max_tokens), top_p=1.0, top_k=-1, support_k=0
        )
        self._bound = bound
        self._world = world

    def verify(self) -> dict[str, float]:
        """Metrics ``sync/gap`` and ``sync/gap_max`` in nats; collective.

        Raises SyncMismatch on every rank when the mean gap exceeds the bound.
        """
        rollouts = self._engine.generate(self._prompts, self._sampling)
        learner_logps = self._learner.logps(rollouts)
        gap = np.concatenate(
            [np.abs(own - r.logps) for own, r in zip(learner_logps, rollouts, strict=True)]
        )
        sums = self._world.sum({"gap": float(gap.sum(dtype=np.float64)), "tokens": float(len(gap))})
        largest = self._world.max({"gap": float(gap.max())})["gap"]
        mean = sums["gap"] / sums["tokens"]
        if not mean <= self._bound:
            raise SyncMismatch(
                f"the rollout engine's log-probs differ from the learner's by {mean:.4g} nats on "
                f"average (largest {largest:.4g}, allowed sync.max_gap={self._bound:g}): the engine "
                "does not hold the learner's weights, or computes another model; check that vLLM "
                "supports this architecture and that rollout.dtype fits train.precision"
            )
        return {"sync/gap": mean, "sync/gap_max": largest}
