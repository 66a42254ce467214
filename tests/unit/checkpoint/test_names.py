"""A parameter's name tells its layer, its module type and its block."""

import pytest

from opd.checkpoint.names import place


@pytest.mark.parametrize(
    ("name", "layer", "module", "block"),
    [
        ("model.layers.12.self_attn.q_proj.weight", 12, "q_proj", "attention"),
        ("model.layers.12.self_attn.q_proj.bias", 12, "q_proj.bias", "attention"),
        ("model.layers.0.self_attn.k_norm.weight", 0, "k_norm", "norm"),
        ("model.layers.3.mlp.experts.7.up_proj.weight", 3, "up_proj", "ffn"),
        ("model.embed_tokens.weight", None, "embed_tokens", "embedding"),
        ("lm_head.weight", None, "lm_head", "head"),
        ("model.norm.weight", None, "norm", "norm"),
        ("model.visual.blocks.4.attn.qkv.weight", 4, "vision.qkv", "vision"),
        ("transformer.h.5.ln_1.weight", 5, "ln_1", "norm"),
        ("transformer.wte.weight", None, "wte", "embedding"),
    ],
)
def test_a_name_tells_its_place(name: str, layer: int | None, module: str, block: str) -> None:
    found = place(name)
    assert (found.layer, found.module, found.block) == (layer, module, block)
