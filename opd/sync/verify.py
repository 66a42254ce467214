"""Check that the engine holds the learner's weights: both score the same tokens."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

import numpy as np

from opd.faults import RunError
from opd.interfaces import RolloutEngine, StudentScorer, Weights, WeightSync
from opd.types import FloatArray, Prompt, Sampling
from opd.world import World


class SyncMismatch(RunError):
    """Engine and learner disagree by more than numerical noise."""


PROBE_VERSION = -1
"""The version of the changed weights that are pushed before a run starts."""
NOISE = 0.25
"""The share of what the changed weights move that rounding may take. GPT-OSS, whose experts and sinks vLLM's
own reload does not reach, has 0.49 with it (a random model of two layers)."""
EXACT = 1e-3
"""Nats that no share of a small move is below."""


class PerturbedLearner(StudentScorer, Protocol):
    """The learner, as far as the first check needs it."""

    def perturbed(self) -> AbstractContextManager[None]:
        """Inside, every weight is a little different; collective."""
        ...

    def weights(self) -> Weights:
        """As ``Learner.weights``."""
        ...


class SyncCheck:
    """A few sampled tokens, scored by both; a mean gap above ``bound`` nats stops the run.

    ``step_bound`` gives the bound for the gap of a step from the first gap that ``verify`` finds; by
    default it is ``bound``.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        learner: StudentScorer,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        bound: float,
        step_bound: Callable[[float], float] | None = None,
        world: World,
    ) -> None:
        self._engine = engine
        self._learner = learner
        self._prompts = prompts
        self._sampling = replace(
            sampling, n=1, max_tokens=min(16, sampling.max_tokens), top_p=1.0, top_k=-1, support_k=0
        )
        self._bound = self._step_bound = bound
        self._bound_from_first = step_bound
        self._world = world

    def verify(self) -> dict[str, float]:
        """Metrics ``sync/gap`` and ``sync/gap_max`` in nats; collective.

        Raises SyncMismatch on every rank when the mean gap exceeds the bound.
        """
        mean, largest = self._gaps()
        if not mean <= self._bound:
            raise SyncMismatch(
                f"the rollout engine's log-probs differ from the learner's by {mean:.4g} nats on "
                f"average (largest {largest:.4g}, allowed sync.max_gap={self._bound:g}): the engine "
                "does not hold the learner's weights, or computes another model; check that vLLM "
                "supports this architecture and that rollout.dtype fits train.precision"
            )
        if self._bound_from_first is not None:
            self._step_bound = self._bound_from_first(mean)
            self._bound_from_first = None
        return {"sync/gap": mean, "sync/gap_max": largest}

    def verify_every_weight(self, learner: PerturbedLearner, sync: WeightSync) -> float:
        """Push weights that all differ from the engine's, and compare; the mean gap in nats. Collective.

        A weight that pushes do not reach, or that the engine does not use as it was pushed, shows here;
        pushing what the engine has been started with hides it until training has moved the weight.
        The learner's own weights are to be pushed next. Raises SyncMismatch.
        """
        with learner.perturbed():
            sync.push(learner.weights(), PROBE_VERSION)
            rollouts = self._engine.generate(self._prompts, self._sampling)
            perturbed = learner.logps(rollouts)
        gap, largest = self._mean_and_largest([r.logps for r in rollouts], perturbed)
        moved, _ = self._mean_and_largest(learner.logps(rollouts), perturbed)
        bound = min(self._bound, max(EXACT, moved * NOISE))
        if not gap <= bound:
            raise SyncMismatch(
                f"after a push of changed weights, which move the learner's log-probs by {moved:.3g} nats on "
                f"average, the rollout engine's differ from them by {gap:.3g} (largest {largest:.3g}, "
                f"allowed {bound:.3g}): some weights do not reach the engine, or it uses them in another "
                "layout, or it computes another model (transformers: some families are wrong beside left "
                "padding, set rollout.batch_size=1); use another rollout engine for this architecture"
            )
        return gap

    def watch(self, metrics: Mapping[str, float]) -> None:
        """Raise SyncMismatch when the gap that a step measured on its rollouts exceeds the bound."""
        gap = metrics.get("engine/logp_gap", 0.0)
        if not gap <= self._step_bound:
            raise SyncMismatch(
                "in this step the log-probs of the rollout engine differ from the learner's by "
                f"{gap:.4g} nats on average (allowed {self._step_bound:.3g}, sync.max_gap sets it): the "
                "engine no longer holds the learner's weights, or rounding has grown; compare sync/gap and "
                "engine/logp_gap of earlier steps, and raise sync.max_gap only for rounding"
            )

    def _gaps(self) -> tuple[float, float]:
        """Mean and largest |learner - engine| in nats over all ranks."""
        rollouts = self._engine.generate(self._prompts, self._sampling)
        engine = [r.logps for r in rollouts]
        return self._mean_and_largest(engine, self._learner.logps(rollouts))

    def _mean_and_largest(
        self, one: Sequence[FloatArray], other: Sequence[FloatArray]
    ) -> tuple[float, float]:
        """Of |one - other| in nats over the tokens of all ranks."""
        gap = np.concatenate([np.abs(a - b) for a, b in zip(one, other, strict=True)])
        sums = self._world.sum({"gap": float(gap.sum(dtype=np.float64)), "tokens": float(len(gap))})
        largest = self._world.max({"gap": float(gap.max())})["gap"]
        return sums["gap"] / sums["tokens"], largest
