"""After a push the engine holds the learner's weights, fused and tied ones included."""

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM
from vllm import LLM

from opd.rollout.vllm import VllmRollouts
from opd.sync.colocated import VllmWeights
from opd.sync.verify import SyncCheck, SyncMismatch
from opd.tracking.console import SilentProgress
from opd.train.weights import full_weights
from opd.types import FloatArray, Prompt, Rollout, Sampling
from opd.world import World

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class TransformersScorer:
    """Log-probs straight from transformers."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model

    def logps(self, rollouts: Sequence[Rollout]) -> list[FloatArray]:
        return [self._logps(r) for r in rollouts]

    def _logps(self, rollout: Rollout) -> FloatArray:
        ids = torch.from_numpy(rollout.sequence.astype(np.int64))[None]
        with torch.no_grad():
            logps = torch.log_softmax(self.model(ids).logits[0].float(), -1)
        first = len(rollout.prompt.token_ids) - 1
        return logps[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0].numpy()


def parts(
    engine_pair: tuple[LLM, Qwen3ForCausalLM], bound: float
) -> tuple[Qwen3ForCausalLM, VllmRollouts, VllmWeights, SyncCheck]:
    llm, model = engine_pair
    engine = VllmRollouts(llm, stop_ids=[3], progress=SilentProgress(), sleeps=False)
    prompts = [Prompt(uid=str(i), token_ids=np.array([7 + i, 9, 11], np.int32)) for i in range(4)]
    check = SyncCheck(
        engine,
        TransformersScorer(model),  # pyright: ignore[reportArgumentType]
        prompts,
        Sampling(max_tokens=16),
        bound=bound,
        world=WORLD,
    )
    return model, engine, VllmWeights(llm, wake=engine.wake, mark=engine.mark), check


def push(model: Qwen3ForCausalLM, sync: VllmWeights, version: int) -> dict[str, float]:
    return sync.push(full_weights(model, lambda parameters: nullcontext()), version)


def disturb(model: Qwen3ForCausalLM, scale: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def test_five_pushes_leave_no_gap(engine_pair: tuple[LLM, Qwen3ForCausalLM]) -> None:
    model, engine, sync, check = parts(engine_pair, bound=1e-4)
    for version in range(1, 6):
        disturb(model, 0.05)
        pushed = push(model, sync, version)
        metrics = check.verify()
        assert metrics["sync/gap_max"] < 1e-4
        assert pushed["sync/bytes"] == 4 * sum(p.numel() for p in model.parameters())
        written = engine.generate(
            [Prompt(uid="v", token_ids=np.array([9], np.int32))], Sampling(max_tokens=2)
        )
        assert written[0].version == version


def test_weights_that_were_not_pushed_stop_the_run(
    engine_pair: tuple[LLM, Qwen3ForCausalLM],
) -> None:
    model, _, sync, check = parts(engine_pair, bound=1e-3)
    push(model, sync, 1)
    check.verify()
    disturb(model, 0.05)
    with pytest.raises(SyncMismatch, match=r"differ from the learner's .* allowed sync.max_gap"):
        check.verify()
    push(model, sync, 2)
    check.verify()


def test_one_wrong_layer_is_noticed(engine_pair: tuple[LLM, Qwen3ForCausalLM]) -> None:
    model, _, sync, check = parts(engine_pair, bound=1e-3)
    push(model, sync, 1)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.5)
    with pytest.raises(SyncMismatch):
        check.verify()
    push(model, sync, 2)
    check.verify()
