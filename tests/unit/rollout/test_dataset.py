"""The engine's share of the prompts is the one set, and the same at every call."""

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
    """Writes the token 5, ``n`` times a prompt, and records the prompts it got."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        self.prompts += [p.uid for p in prompts]
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


def test_a_data_set_completes_once_and_has_no_log_probs() -> None:
    rollouts = DatasetRollouts().generate([prompt(0), prompt(1)], Sampling(n=4))
    assert [r.token_ids.tolist() for r in rollouts] == [[7, 8, 9], [7, 8, 9]]
    assert all(np.isnan(r.logps).all() for r in rollouts)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_the_engine_completes_its_share_and_order_is_kept(share: float) -> None:
    prompts = [prompt(i) for i in range(2000)]
    engine = Engine()
    rollouts = MixedRollouts(engine, on_policy=share).generate(prompts, Sampling(n=2, seed=1))
    assert len(engine.prompts) / 2000 == pytest.approx(share, abs=0.04)
    own = set(engine.prompts)
    expected = [p.uid for p in prompts for _ in range(2 if p.uid in own else 1)]
    assert [r.prompt.uid for r in rollouts] == expected
    assert all(np.isnan(r.logps).any() == (r.prompt.uid not in own) for r in rollouts)


def test_the_draw_depends_on_step_and_prompt_alone() -> None:
    prompts = [prompt(i) for i in range(200)]

    def own(some: Sequence[Prompt], seed: int) -> set[str]:
        engine = Engine()
        MixedRollouts(engine, on_policy=0.5).generate(some, Sampling(seed=seed))
        return set(engine.prompts)

    whole = own(prompts, 1)
    assert whole == own(prompts[:100], 1) | own(prompts[100:], 1)
    assert whole != own(prompts, 2)


def test_an_engine_that_is_not_needed_gets_no_prompts() -> None:
    engine = Engine()
    MixedRollouts(engine, on_policy=1e-9).generate([prompt(0)], Sampling())
    assert engine.prompts == []
