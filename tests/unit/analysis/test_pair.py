"""Tensors of two checkpoints are matched across names, ties and fused parameters."""

from pathlib import Path

import torch

from tests.unit.analysis import dense
from tests.unit.analysis.dense import DECOMPOSED, agrees
from tests.unit.analysis.pairs import renamed, rows_of, stepped, weights


def test_a_vision_language_pair_is_matched_across_names(tmp_path: Path) -> None:
    base = weights() | {"visual.blocks.0.attn.qkv.weight": (0.03 * torch.randn(72, 24)).bfloat16()}
    new = renamed(
        base,
        lambda n: n.replace("model.", "model.language_model.", 1).replace(
            "visual.", "model.visual."
        ),
    )
    old = renamed(stepped(base), lambda n: n.replace("model.", "language_model.model.", 1))
    rows = rows_of(tmp_path, new, old)
    assert all(row["status"] == "ok" for row in rows.values())
    assert rows["model.layers.1.mlp.down_proj.weight"]["block"] == "ffn"
    parts = [f"visual.blocks.0.attn.{part}.weight" for part in "qkv"]
    assert set(rows) == {*weights(), *parts}
    expected = dense.spectral(
        base["visual.blocks.0.attn.qkv.weight"][24:48],
        stepped(base)["visual.blocks.0.attn.qkv.weight"][24:48],
    )
    agrees(rows[parts[1]]["bf16"]["spectrum"], expected, DECOMPOSED)


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    base = weights()
    both = base | {"lm_head.weight": base["model.embed_tokens.weight"]}
    rows = rows_of(tmp_path, both, stepped(both), tie_word_embeddings=True)
    assert set(rows) == set(base)


def test_fused_matrices_and_experts_are_taken_apart(tmp_path: Path) -> None:
    apart = weights(
        shapes={
            "model.layers.0.self_attn.q_proj.weight": (48, 48),
            "model.layers.0.self_attn.k_proj.weight": (16, 48),
            "model.layers.0.self_attn.v_proj.weight": (16, 48),
            "model.layers.0.mlp.experts.0.gate_proj.weight": (20, 48),
            "model.layers.0.mlp.experts.0.up_proj.weight": (20, 48),
            "model.layers.0.mlp.experts.1.gate_proj.weight": (20, 48),
            "model.layers.0.mlp.experts.1.up_proj.weight": (20, 48),
        }
    )
    moved = list(stepped(apart).values())
    fused = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.cat(moved[:3]),
        "model.layers.0.mlp.experts.gate_up_proj": torch.stack(
            [torch.cat(moved[3:5]), torch.cat(moved[5:7])]
        ),
    }
    rows = rows_of(
        tmp_path,
        apart,
        fused,
        num_attention_heads=6,
        num_key_value_heads=2,
        hidden_size=48,
        moe_intermediate_size=20,
    )
    assert [row["status"] for row in rows.values()] == ["ok"] * 7
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert rows[name]["bf16"]["zero"] == int((moved[6] == apart[name]).sum())
