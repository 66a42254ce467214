"""Our head gives the log-probs of the models' own heads, and keeps its promise of float32."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
)

from opd.head import (
    HeadSpec,
    as_operand,
    chunk_rows,
    exact_half,
    head_logps,
    matmul_float32,
    vocab_blocks,
)
from opd.model_head import head_spec

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=0.5),
        GraniteConfig(**TINY, logits_scaling=0.2),
        CohereConfig(**TINY, logit_scale=4.0),
    ],
    ids=lambda config: config.model_type,
)
def test_log_probs_equal_those_of_the_models_own_logits(config: Any) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform
        ids = torch.arange(1, 12)[None]
        hidden = model.base_model(ids).last_hidden_state[0]
        expected = model(ids).logits[0]
        found = head_logps(hidden, model.lm_head.weight, head_spec(config), 0.8)
    torch.testing.assert_close(found, torch.log_softmax(expected / 0.8, dim=-1))
    plain = torch.log_softmax(hidden @ model.lm_head.weight.T / 0.8, dim=-1)
    assert torch.allclose(found, plain) == (config.model_type == "llama")


def test_padding_rows_of_the_matrix_get_no_probability() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(10, 4)
    weight[7:] = 100.0
    for dtype in (torch.float32, torch.bfloat16):
        logps = head_logps(hidden.to(dtype), weight.to(dtype), HeadSpec(vocab_size=7))
        assert logps.shape == (3, 7)
        torch.testing.assert_close(logps.exp().sum(1), torch.ones(3))


@pytest.mark.parametrize("mixed", [torch.bfloat16, torch.float32])
def test_bfloat16_product_is_not_rounded_to_bfloat16(mixed: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(8, 64, generator=g)).bfloat16()
    weight = torch.randn(500, 64, generator=g).to(torch.bfloat16).to(mixed)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, dim=-1)
    found = head_logps(hidden, weight, HeadSpec(vocab_size=500))
    rounded = torch.log_softmax((hidden @ weight.bfloat16().T).float(), dim=-1)
    assert (found - exact).abs().max() < 5e-5
    assert (rounded - exact).abs().max() > 0.05, "what a bfloat16 result would cost"


def test_head_log_probs_have_gradients() -> None:
    hidden = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.bfloat16, requires_grad=True)
    head_logps(hidden, weight, HeadSpec(vocab_size=7))[:, 0].sum().backward()
    dense = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    torch.log_softmax(dense[0].float() @ dense[1].float().T, dim=-1)[:, 0].sum().backward()
    torch.testing.assert_close(hidden.grad, dense[0].grad)
    torch.testing.assert_close(weight.grad, dense[1].grad)


def test_autocast_does_not_lower_the_product() -> None:
    left, right = torch.randn(5, 64), torch.randn(64, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (left @ right).dtype == torch.bfloat16
        assert torch.equal(matmul_float32(left, right), left @ right) is False
        found = matmul_float32(left, right)
    assert torch.equal(found, left @ right)


def test_chunks_fit_their_budget_and_are_never_empty() -> None:
    assert chunk_rows(1000, budget_bytes=40_000) == 10
    assert chunk_rows(1000, budget_bytes=1) == 1
    weight = torch.empty(151_936, 896, device="meta")
    blocks = vocab_blocks(weight)
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, 151_936)
    assert max(b.stop - b.start for b in blocks) * 896 * 4 <= 64 << 20


def test_a_head_becomes_bfloat16_only_where_no_value_changes() -> None:
    weight = torch.randn(5, 4)
    assert exact_half(weight) is weight
    halves = exact_half(weight.bfloat16().float())
    assert halves.dtype == torch.bfloat16
    assert torch.equal(halves.float(), weight.bfloat16().float())
    on_cpu = as_operand(weight.bfloat16(), torch.device("cpu"))
    assert on_cpu.dtype == torch.float32
