"""Routers keep their family's number format under autocast, and say how evenly experts are chosen."""

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from opd.train.routers import RouterLoad, keep_float32_routers, routers
from opd.world import World
from tests.unit.train.test_checkpoint_layout import FAMILIES, SIZES

WORLD = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
IDS = torch.arange(2, 26).view(2, 12)
IN_FLOAT32 = {"deepseek_v3": True, "glm4_moe": True, "qwen3_moe": False, "mixtral": False}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    settings = FAMILIES.get(family, {"num_local_experts": 4, "num_experts_per_tok": 2})
    config = CONFIG_MAPPING[family](**(SIZES | settings))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def recorded(router: Any) -> list[tuple[torch.Tensor, Any]]:
    """(states, output) of each call."""
    calls: list[tuple[torch.Tensor, Any]] = []
    router.register_forward_hook(lambda module, args, out: calls.append((args[0].detach(), out)))
    return calls


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", 0), ("qwen3_moe", 2), ("gpt_oss", 2), ("deepseek_v3", 1)]
)
def test_every_layer_with_experts_has_a_router(family: str, layers: int) -> None:
    assert len(routers(model_of(family))) == layers


@pytest.mark.parametrize("family", IN_FLOAT32)
def test_a_router_of_float32_is_one_under_autocast_too(family: str) -> None:
    model = model_of(family)
    keep_float32_routers(model)
    router: Any = routers(model)[0][0]
    calls = recorded(router)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(IDS)
    states, (logits, *_) = calls[0]
    exact = states.float().reshape(-1, states.shape[-1]) @ router.weight.T
    assert torch.equal(logits.float(), exact) == IN_FLOAT32[family]
    assert torch.allclose(logits.float(), exact, atol=0.05)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_loads_are_those_of_real_tokens_relative_to_equal_ones(family: str) -> None:
    model = model_of(family)
    load = RouterLoad(model)
    calls = [recorded(router) for router, _ in routers(model)]
    mask = torch.ones_like(IDS)
    mask[1, 5:] = 0
    load.expect(mask)
    with torch.no_grad(), load.counting():
        model(input_ids=IDS, attention_mask=mask)
    found = load.metrics(WORLD)
    shares = []
    for layer in calls:
        chosen = next(t for t in layer[0][1] if not t.is_floating_point())
        chosen = chosen.view(2, 12, -1)[mask.bool()]
        counts = torch.bincount(chosen.flatten(), minlength=4).double()
        shares.append(counts / counts.sum())
    assert found["router/max_load"] == pytest.approx(4 * max(float(s.max()) for s in shares))
    assert found["router/min_load"] == pytest.approx(4 * min(float(s.min()) for s in shares))
    assert 0.3 < found["router/entropy"] <= 1.0
    with torch.no_grad(), load.counting():
        pass
    assert load.metrics(WORLD) == {}


def test_tokens_outside_of_a_step_are_not_counted() -> None:
    model = model_of("qwen3_moe")
    load = RouterLoad(model)
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert load.metrics(WORLD) == {}


def test_a_model_without_experts_reports_no_loads() -> None:
    model = model_of("llama")
    load = RouterLoad(model)
    with torch.no_grad(), load.counting():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    assert load.metrics(WORLD) == {}
