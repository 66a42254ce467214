"""The contract of a rollout engine, for vLLM and for transformers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Qwen3ForCausalLM
from vllm import LLM

from opd.interfaces import RolloutEngine
from opd.rollout.transformers import TransformersRollouts
from opd.rollout.vllm import VllmRollouts
from opd.tracking.console import SilentProgress
from opd.types import FinishReason, Prompt, Rollout, Sampling

STOP = [3, 5]


def prompts() -> list[Prompt]:
    draw = np.random.default_rng(0)
    lengths = (4, 9, 2, 6, 5)
    return [
        Prompt(uid=f"p{i}", token_ids=draw.integers(6, 97, length).astype(np.int32))
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(params=["vllm", "transformers"])
def engine(
    request: pytest.FixtureRequest, engine_pair: tuple[LLM, Qwen3ForCausalLM]
) -> RolloutEngine:
    llm, model = engine_pair
    if request.param == "vllm":
        return VllmRollouts(llm, stop_ids=STOP, progress=SilentProgress(), sleeps=False)
    return TransformersRollouts(
        model, stop_ids=STOP, pad_id=0, batch_size=100, progress=SilentProgress()
    )


def reference_logps(model: Qwen3ForCausalLM, rollout: Rollout, temperature: float) -> np.ndarray:
    ids = torch.from_numpy(rollout.sequence.astype(np.int64))[None]
    with torch.no_grad():
        logps = torch.log_softmax(model(ids).logits[0].float() / temperature, -1)
    first = len(rollout.prompt.token_ids) - 1
    return logps[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0].numpy()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_the_sampled_distribution(
    engine: RolloutEngine, engine_pair: tuple[LLM, Qwen3ForCausalLM], temperature: float
) -> None:
    written = engine.generate(prompts(), Sampling(n=3, temperature=temperature, max_tokens=20))
    for rollout in written:
        expected = reference_logps(engine_pair[1], rollout, temperature)
        assert np.abs(rollout.logps - expected).max() < 2e-5


def test_rollouts_come_grouped_by_prompt_in_order(engine: RolloutEngine) -> None:
    given = prompts()
    written = engine.generate(given, Sampling(n=3, max_tokens=8))
    assert [r.prompt.uid for r in written] == [p.uid for p in given for _ in range(3)]
    assert [r.sample for r in written] == [0, 1, 2] * len(given)
    assert len({r.token_ids.tobytes() for r in written}) > len(given)


def test_one_seed_draws_the_same_and_another_seed_does_not(engine: RolloutEngine) -> None:
    first, second, other = (
        engine.generate(prompts(), Sampling(n=2, max_tokens=12, seed=seed)) for seed in (7, 7, 8)
    )
    for a, b in zip(first, second, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert a.logps.tobytes() == b.logps.tobytes()
    assert any(
        a.token_ids.tolist() != c.token_ids.tolist() for a, c in zip(first, other, strict=True)
    )


def test_vllm_draws_do_not_depend_on_the_order_of_requests(
    engine_pair: tuple[LLM, Qwen3ForCausalLM],
) -> None:
    engine = VllmRollouts(engine_pair[0], stop_ids=STOP, progress=SilentProgress(), sleeps=False)
    sampling = Sampling(n=2, max_tokens=12, seed=1)
    forward = {(r.prompt.uid, r.sample): r for r in engine.generate(prompts(), sampling)}
    for rollout in engine.generate(prompts()[::-1], sampling):
        expected = forward[rollout.prompt.uid, rollout.sample]
        assert rollout.token_ids.tolist() == expected.token_ids.tolist()


def test_more_prompt_tokens_than_one_engine_step_takes_change_nothing(
    engine_pair: tuple[LLM, Qwen3ForCausalLM],
) -> None:
    engine = VllmRollouts(engine_pair[0], stop_ids=STOP, progress=SilentProgress(), sleeps=False)
    draw = np.random.default_rng(1)
    many = [
        Prompt(uid=str(i), token_ids=draw.integers(6, 97, 41).astype(np.int32)) for i in range(250)
    ]
    sampling = Sampling(max_tokens=4, seed=5)
    written = engine.generate(many, sampling)
    assert [r.prompt.uid for r in written] == [p.uid for p in many]
    alone = engine.generate(many[200:201], sampling)[0]
    assert alone.token_ids.tolist() == written[200].token_ids.tolist()


def test_a_completion_ends_with_its_first_stop_token(engine: RolloutEngine) -> None:
    written = engine.generate(prompts(), Sampling(n=40, max_tokens=30))
    stopped = [r for r in written if r.finish_reason == FinishReason.stop]
    truncated = [r for r in written if r.finish_reason == FinishReason.length]
    assert stopped
    assert truncated
    for rollout in stopped:
        assert rollout.token_ids[-1] in STOP
        assert not np.isin(rollout.token_ids[:-1], STOP).any()
    for rollout in truncated:
        assert len(rollout.token_ids) == 30
        assert not np.isin(rollout.token_ids[:-1], STOP).any()


def test_greedy_takes_the_likeliest_token(
    engine: RolloutEngine, engine_pair: tuple[LLM, Qwen3ForCausalLM]
) -> None:
    for rollout in engine.generate(prompts(), Sampling(temperature=0.0, max_tokens=6)):
        ids = torch.from_numpy(rollout.sequence.astype(np.int64))[None]
        with torch.no_grad():
            best = engine_pair[1](ids).logits[0].argmax(-1)
        first = len(rollout.prompt.token_ids) - 1
        assert rollout.token_ids.tolist() == best[first:-1].tolist()


def test_support_holds_the_likeliest_ids(
    engine: RolloutEngine, engine_pair: tuple[LLM, Qwen3ForCausalLM]
) -> None:
    for rollout in engine.generate(prompts(), Sampling(max_tokens=6, support_k=5)):
        ids = torch.from_numpy(rollout.sequence.astype(np.int64))[None]
        with torch.no_grad():
            logits = engine_pair[1](ids).logits[0]
        first = len(rollout.prompt.token_ids) - 1
        expected = logits[first:-1].topk(5).indices
        assert rollout.support_ids is not None
        assert rollout.support_ids.shape == (len(rollout.token_ids), 5)
        assert np.sort(rollout.support_ids).tolist() == expected.sort().values.tolist()


def test_no_prompts_no_rollouts(engine: RolloutEngine) -> None:
    assert engine.generate([], Sampling(max_tokens=4)) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "leak",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"temperature": 0.3, "top_k": 2, "top_p": 0.5, "do_sample": True},
        {"min_p": 0.3, "typical_p": 0.5},
        {"suppress_tokens": [7, 8, 9]},
        {"min_new_tokens": 19},
    ],
    ids=lambda leak: "+".join(leak),
)
def test_a_models_own_generation_config_changes_nothing(
    engine_pair: tuple[LLM, Qwen3ForCausalLM], leak: dict[str, Any], temperature: float
) -> None:
    model = engine_pair[1]
    engine = TransformersRollouts(
        model, stop_ids=STOP, pad_id=0, batch_size=100, progress=SilentProgress()
    )
    sampling = Sampling(n=2, temperature=temperature, max_tokens=20)
    expected = engine.generate(prompts(), sampling)
    own = model.generation_config
    model.generation_config = leaking = GenerationConfig(**leak)
    try:
        found = engine.generate(prompts(), sampling)
        assert model.generation_config is leaking
    finally:
        model.generation_config = own
    for a, b in zip(expected, found, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.array_equal(a.logps, b.logps)


def test_requests_of_a_failed_call_are_not_answered_in_the_next_one(
    engine_pair: tuple[LLM, Qwen3ForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = engine_pair[0]
    engine = VllmRollouts(llm, stop_ids=STOP, progress=SilentProgress(), sleeps=False)
    sampling = Sampling(n=2, max_tokens=12, seed=3)
    expected = engine.generate(prompts(), sampling)
    step, steps = llm.llm_engine.step, iter(range(9))

    def fail_in_the_middle() -> Any:
        if next(steps) == 3:
            raise RuntimeError("out of memory")
        return step()

    with monkeypatch.context() as failing:
        failing.setattr(llm.llm_engine, "step", fail_in_the_middle)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.generate(prompts(), sampling)
    assert not llm.llm_engine.has_unfinished_requests()
    for one, two in zip(engine.generate(prompts(), sampling), expected, strict=True):
        assert one.token_ids.tolist() == two.token_ids.tolist()
        assert one.logps.tobytes() == two.logps.tobytes()
