"""A model held in bf16 computes like its float32 copy, one layer at a time, and keeps its weights."""

import copy
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from opd.config.adapter import LoraConfig
from opd.reference import reference_logps
from opd.train.float32 import float32_layers
from opd.train.parameter_mask import SparseTraining
from opd.train.student import causal_lm
from opd.train.weights import with_lora
from tests.support.learners import tiny_mask

IDS = torch.arange(3, 20).numpy()
LAYERS = 3


def model(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=tied,
    )
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


@pytest.mark.parametrize("kind", ["tied", "untied", "masked", "adapted"])
def test_log_probs_are_those_of_a_float32_copy(kind: str) -> None:
    held = model(tied=kind != "untied")
    expected = reference_logps(copy.deepcopy(held).float(), IDS)
    rounded = reference_logps(held, IDS)
    if kind == "masked":
        SparseTraining(held, tiny_mask(held))
    if kind == "adapted":
        held = with_lora(held, LoraConfig(r=2)).to(torch.bfloat16)
    before = {name: p.detach().clone() for name, p in held.named_parameters()}
    with float32_layers(held):
        found = reference_logps(causal_lm(held), IDS)
    assert torch.equal(found, expected)
    assert not torch.equal(rounded, expected)
    for name, parameter in held.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name]), name


def test_one_layer_is_float32_at_a_time() -> None:
    held, found = model(), []

    def count(module: torch.nn.Module, *rest: object) -> None:
        found.append([p.dtype for layer in held.model.layers for p in layer.parameters()])

    with float32_layers(held):
        for layer in held.model.layers:
            layer.mlp.register_forward_hook(count)
        reference_logps(held, IDS)
    weights = len(found[0]) // LAYERS
    assert [dtypes.count(torch.float32) for dtypes in found] == [weights] * LAYERS


def test_weights_come_back_after_a_forward_pass_that_fails() -> None:
    held = model()
    held.model.layers[1].mlp.register_forward_pre_hook(lambda module, inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError), float32_layers(held, held.lm_head.parameters()):
        reference_logps(held, IDS)
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks for module in held.modules())


def test_float32_weights_are_left_alone() -> None:
    held = model().float()
    addresses = [p.data_ptr() for p in held.parameters()]
    with float32_layers(held, held.lm_head.parameters()):
        assert not any(module._forward_pre_hooks for module in held.modules())
        assert [p.data_ptr() for p in held.parameters()] == addresses
