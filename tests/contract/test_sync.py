"""After a push the engine holds the learner's weights, fused and tied ones included."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM
from vllm import LLM

from opd.config.sync import gap_bound, watched_bound
from opd.config.train import Precision
from opd.interfaces import Weights
from opd.rollout.vllm import VllmRollouts
from opd.sync.colocated import VllmWeights
from opd.sync.verify import SyncCheck, SyncMismatch
from opd.tracking.console import SilentProgress
from opd.train.weights import flip_bit, full_weights
from opd.types import FloatArray, Prompt, Rollout, Sampling
from opd.world import World

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))


class TransformersScorer:
    """Log-probs straight from transformers."""

    def __init__(self, model: Qwen3ForCausalLM) -> None:
        self.model = model

    def logps(self, rollouts: Sequence[Rollout]) -> list[FloatArray]:
        return [self._logps(r) for r in rollouts]

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        self._flip()
        yield
        self._flip()

    def _flip(self) -> None:
        for parameter in self.model.parameters():
            flip_bit(parameter)

    def weights(self) -> Weights:
        return full_weights(self.model, lambda parameters: nullcontext())

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


def test_the_first_push_is_of_changed_weights_that_come_back_bit_for_bit(
    engine_pair: tuple[LLM, Qwen3ForCausalLM],
) -> None:
    model, _, sync, check = parts(engine_pair, bound=1e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learner = TransformersScorer(model)
    assert check.verify_every_weight(learner, sync) < 1e-4  # pyright: ignore[reportArgumentType]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.raises(SyncMismatch):
        check.verify()  # the engine still has the changed weights
    push(model, sync, 0)
    check.verify()


class Without:
    """A sync that pushes an old copy of one tensor: what an engine does that a tensor never reaches."""

    def __init__(self, inner: VllmWeights, model: Any, name: str) -> None:
        self.inner, self.name = inner, name
        self.old = model.get_parameter(name).detach().clone()

    def push(self, weights: Weights, version: int) -> dict[str, float]:
        kept = ((n, self.old if n == self.name else tensor) for n, tensor in weights)
        return self.inner.push(kept, version)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.v_proj.weight",
        "model.norm.weight",
    ],
)
def test_a_tensor_that_pushes_do_not_reach_is_noticed_before_training(
    engine_pair: tuple[LLM, Qwen3ForCausalLM], name: str
) -> None:
    model, _, sync, check = parts(engine_pair, bound=1e-3)
    push(model, sync, 1)
    stale = Without(sync, model, name)
    stale.push(full_weights(model, lambda parameters: nullcontext()), 2)
    check.verify()  # nothing to see while the weights have not moved
    with pytest.raises(SyncMismatch, match="after a push of changed weights"):
        check.verify_every_weight(TransformersScorer(model), stale)  # pyright: ignore
    push(model, sync, 3)


def test_the_gap_of_every_step_has_a_bound(engine_pair: tuple[LLM, Qwen3ForCausalLM]) -> None:
    model, engine, sync, exact = parts(engine_pair, bound=1e-3)
    push(model, sync, 1)
    exact.verify()
    exact.watch({"engine/logp_gap": 9e-4})
    exact.watch({"loss/total": 1.0})
    for gap in (2e-3, float("nan"), 0.07):
        with pytest.raises(SyncMismatch, match="in this step the log-probs"):
            exact.watch({"engine/logp_gap": gap})
    bf16 = SyncCheck(
        engine,
        TransformersScorer(model),  # pyright: ignore[reportArgumentType]
        [Prompt(uid="a", token_ids=np.array([7, 9], np.int32))],
        Sampling(max_tokens=16),
        bound=0.15,
        step_bound=partial(watched_bound, Precision.bf16, 0.15),
        world=WORLD,
    )
    bf16.watch({"engine/logp_gap": 0.07})  # nothing is known yet
    bf16.verify()
    bf16.watch({"engine/logp_gap": 0.019})
    with pytest.raises(SyncMismatch):
        bf16.watch({"engine/logp_gap": 0.07})


def test_bounds_in_bf16_follow_the_rounding_of_the_model() -> None:
    assert gap_bound(Precision.fp32, None) == 1e-3
    assert gap_bound(Precision.bf16, None) == gap_bound(Precision.pure_bf16, None) == 0.15
    assert gap_bound(Precision.bf16, 1e-4) == 0.02
    assert gap_bound(Precision.bf16, 0.0156) == pytest.approx(0.0936)  # SmolLM2-135M
    assert gap_bound(Precision.bf16, 0.1) == 0.15
    assert watched_bound(Precision.fp32, 1e-3, 1e-7) == 1e-3
    assert watched_bound(Precision.bf16, 0.0936, 0.037) == 0.0936
    assert watched_bound(Precision.bf16, 0.15, 0.01) == pytest.approx(0.05)
