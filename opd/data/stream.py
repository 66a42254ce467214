"""The order of training prompts: a pure function of seed and step, so nothing is saved for a resume."""

from collections.abc import Sequence

import numpy as np

from opd.types import Prompt


class ShuffledPrompts:
    """A ``PromptStream``: a new permutation for each epoch, in batches of ``per_step`` prompts.

    The global batch of a step depends only on ``seed`` and ``step``. Rank r takes every ``size``-th
    prompt of it, starting at r, so the shares of ranks differ by at most one prompt (a share is empty
    where ``size`` exceeds ``per_step``). No prompt occurs twice in one batch: the up to
    ``per_step - 1`` prompts left over at the end of an epoch, others each time, are skipped in it.
    """

    def __init__(
        self, prompts: Sequence[Prompt], per_step: int, seed: int, rank: int = 0, size: int = 1
    ) -> None:
        assert 0 <= rank < size
        if not 0 < per_step <= len(prompts):
            raise ValueError(
                f"found train.prompts_per_step={per_step}; allowed: 1 to {len(prompts)}, the "
                "number of training prompts; lower it or add prompts"
            )
        self._prompts = prompts
        self._per_step = per_step
        self._seed = seed
        self._rank = rank
        self._size = size

    def take(self, step: int) -> list[Prompt]:
        """This rank's prompts of optimizer step ``step`` (from 0)."""
        epoch, batch = divmod(step, len(self._prompts) // self._per_step)
        seeded = np.random.Philox(np.random.SeedSequence([self._seed, epoch]))
        order = np.random.Generator(seeded).permutation(len(self._prompts))
        whole = order[batch * self._per_step : (batch + 1) * self._per_step]
        return [self._prompts[index] for index in whole[self._rank :: self._size]]
