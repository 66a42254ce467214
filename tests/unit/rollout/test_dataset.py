"""Who writes: the engine's share is what was asked, and the same whenever asked."""

from collections.abc import Sequence

import numpy as np
import pytest

from opd.rollout.dataset import DatasetRollouts, MixedRollouts
from opd.types import FinishReason, Prompt, Rollout, Sampling


def prompt(number: int) -> Prompt:
    return Prompt(
        uid=str(number),
        token_ids=np.array([1, 2], np.int32),
        completion_ids=np.array([7, 8, 9], np.int32),
    )


class Engine:
    """Writes the token 5, ``n`` times a prompt, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        self.asked += [p.uid for p in prompts]
        return [
            Rollout(
                prompt=p,
                token_ids=np.array([5], np.int32),
                logps=np.array([-1.0], np.float32),
                finish_reason=FinishReason.stop,
                version=3,
                sample=sample,
            )
            for p in prompts
            for sample in range(sampling.n)
        ]


def test_a_data_set_answers_once_and_no_engine_has_log_probs() -> None:
    rollouts = DatasetRollouts().generate([prompt(0), prompt(1)], Sampling(n=4))
    assert [r.token_ids.tolist() for r in rollouts] == [[7, 8, 9], [7, 8, 9]]
    assert all(np.isnan(r.logps).all() for r in rollouts)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_engine_answers_its_share_and_order_is_kept(share: float) -> None:
    prompts = [prompt(i) for i in range(2000)]
    engine = Engine()
    rollouts = MixedRollouts(engine, on_policy=share).generate(prompts, Sampling(n=2, seed=1))
    assert len(engine.asked) / 2000 == pytest.approx(share, abs=0.04)
    own = set(engine.asked)
    expected = [p.uid for p in prompts for _ in range(2 if p.uid in own else 1)]
    assert [r.prompt.uid for r in rollouts] == expected
    assert all(np.isnan(r.logps).any() == (r.prompt.uid not in own) for r in rollouts)


def test_the_draw_depends_on_step_and_prompt_not_on_company() -> None:
    prompts = [prompt(i) for i in range(200)]

    def own(some: Sequence[Prompt], seed: int) -> set[str]:
        engine = Engine()
        MixedRollouts(engine, on_policy=0.5).generate(some, Sampling(seed=seed))
        return set(engine.asked)

    whole = own(prompts, 1)
    assert whole == own(prompts[:100], 1) | own(prompts[100:], 1)
    assert whole != own(prompts, 2)


def test_an_engine_that_is_not_needed_is_not_asked() -> None:
    engine = Engine()
    MixedRollouts(engine, on_policy=1e-9).generate([prompt(0)], Sampling())
    assert engine.asked == []
