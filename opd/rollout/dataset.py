"""Completions from a data set, alone or mixed with the student's own."""

import hashlib
from collections.abc import Sequence

import numpy as np

from opd.interfaces import RolloutEngine
from opd.types import FinishReason, Prompt, Rollout, Sampling


def read_rollout(prompt: Prompt) -> Rollout:
    """The data set's completion of a prompt; no engine wrote it, so its log-probs are NaN."""
    assert prompt.completion_ids is not None, "read together with the prompt"
    return Rollout(
        prompt=prompt,
        token_ids=prompt.completion_ids,
        logps=np.full(len(prompt.completion_ids), np.nan, np.float32),
        finish_reason=FinishReason.stop,
        version=0,
    )


class DatasetRollouts:
    """A ``RolloutEngine`` without a model: one completion per prompt, the data set's."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See ``RolloutEngine``; ``sampling`` is not used."""
        return [read_rollout(prompt) for prompt in prompts]


class MixedRollouts:
    """``engine`` completes a share of the prompts, the data set the others, one completion each.

    The engine takes a prompt with probability ``on_policy``, drawn for every prompt of every step from
    ``Sampling.seed`` and the prompt's uid alone (lambda of GKD, arXiv 2306.13649, drawn per prompt
    where GKD draws per batch).
    """

    def __init__(self, engine: RolloutEngine, *, on_policy: float) -> None:
        self._engine = engine
        self._on_policy = on_policy

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """See ``RolloutEngine``."""
        own = [p for p in prompts if _draw(p, sampling) < self._on_policy]
        written = self._engine.generate(own, sampling)  # called even for none: it then sleeps
        by_prompt: dict[str, list[Rollout]] = {}
        for rollout in written:
            by_prompt.setdefault(rollout.prompt.uid, []).append(rollout)
        return [r for p in prompts for r in by_prompt.get(p.uid) or [read_rollout(p)]]


def _draw(prompt: Prompt, sampling: Sampling) -> float:
    """Uniform in [0, 1)."""
    key = f"{sampling.seed}:{prompt.uid}:who writes"
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64
