"""Sparse pushes leave the engine as dense ones do, fused and tied weights included."""

from contextlib import nullcontext

import pytest
import torch
from transformers import Qwen3ForCausalLM
from vllm import LLM

from opd.sync.in_place import load_all
from opd.sync.receiver import WeightReceiver
from opd.sync.sender import WeightSender
from opd.train.weights import full_weights
from tests.contract.test_sync import disturb, parts

EXACT = 1e-4


def disturb_some(model: Qwen3ForCausalLM, share: float, only: str = "") -> None:
    """Move ``share`` of the weights of the parameters whose names hold ``only``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                moved = torch.rand_like(parameter) < share
                parameter.add_(torch.randn_like(parameter) * 0.3 * moved)


def current_weights(model: Qwen3ForCausalLM):
    return full_weights(model, lambda parameters: nullcontext())


@pytest.mark.parametrize("masked", [False, True])
def test_sparse_pushes_leave_no_gap(
    engine_pair: tuple[LLM, Qwen3ForCausalLM], masked: bool
) -> None:
    model, engine, dense, check = parts(engine_pair, bound=EXACT)
    kept = None
    if masked:
        kept = {name: torch.arange(t.numel()) for name, t in current_weights(model)}
    sender = WeightSender(
        dtype=torch.float32, snapshot_every=4, kept=kept, fingerprint="all" if masked else None
    )
    receiver = WeightReceiver(load_all(dense))

    def push(version: int) -> None:
        sender.prepare(current_weights(model), version)
        state = receiver.state()
        while (message := sender.next_for(state)) is not None:
            state = receiver.take(message)
        sender.commit()

    push(1)
    for version, only in enumerate(["", "q_proj", "up_proj", "embed", "norm", ""], start=2):
        disturb_some(model, 0.03, only)
        push(version)
        assert check.verify()["sync/gap_max"] < EXACT, only
        assert engine.generate(check._prompts, check._sampling)[0].version == version
        after_sparse = engine.generate(check._prompts, check._sampling)
        dense.push(current_weights(model), version)
        after_dense = engine.generate(check._prompts, check._sampling)
        for one, two in zip(after_sparse, after_dense, strict=True):
            assert one.token_ids.tolist() == two.token_ids.tolist()
            assert one.logps.tobytes() == two.logps.tobytes()


def test_a_version_that_was_prepared_and_not_sent_is_noticed(
    engine_pair: tuple[LLM, Qwen3ForCausalLM],
) -> None:
    model, _, dense, check = parts(engine_pair, bound=EXACT)
    sender, receiver = (
        WeightSender(dtype=torch.float32, snapshot_every=9),
        WeightReceiver(load_all(dense)),
    )
    sender.prepare(current_weights(model), 0)
    message = sender.next_for(receiver.state())
    assert message is not None
    receiver.take(message)
    sender.commit()
    check.verify()
    disturb(model, 0.05)
    sender.prepare(current_weights(model), 1)
    with pytest.raises(RuntimeError, match="does not hold the learner's weights"):
        check.verify()
