"""Tensors of two checkpoints are matched across names, ties and fused parameters."""

from pathlib import Path

import pytest
import torch

from opd.analysis.pair import pair_checkpoints
from opd.analysis.summary import summarize
from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from tests.unit.analysis import dense
from tests.unit.analysis.dense import DECOMPOSED, agrees
from tests.unit.analysis.pairs import Tensors, renamed, rows_of, stepped, stored, weights


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
    assert set(rows) == {*weights(), "visual.blocks.0.attn.qkv.weight", *parts}
    expected = dense.spectral(
        base["visual.blocks.0.attn.qkv.weight"][24:48],
        stepped(base)["visual.blocks.0.attn.qkv.weight"][24:48],
    )
    agrees(rows[parts[1]]["bf16"]["spectrum"], expected, DECOMPOSED)


def test_a_tied_head_counts_once(tmp_path: Path) -> None:
    base = weights()
    both = base | {"lm_head.weight": base["model.embed_tokens.weight"]}
    moved = stepped(base)
    moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
    rows = rows_of(tmp_path, both, moved, tie_word_embeddings=True)
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
    assert all(row["part_of"] is None and not row["is_fused"] for row in rows.values())
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    assert rows[name]["bf16"]["zero"] == int((moved[6] == apart[name]).sum())


QKV = "model.layers.0.self_attn.qkv_proj.weight"
HEADS = {"num_attention_heads": 3, "hidden_size": 48}


def fused_and_apart() -> tuple[Tensors, Tensors]:
    apart = weights(
        shapes={f"model.layers.0.self_attn.{part}_proj.weight": (48, 48) for part in "qkv"}
    )
    return {QKV: torch.cat(list(apart.values()))}, apart


def test_a_tensor_that_both_store_whole_is_listed_whole_and_in_parts(tmp_path: Path) -> None:
    fused, apart = fused_and_apart()
    rows = rows_of(tmp_path, fused, stepped(fused), **HEADS)
    assert set(rows) == {QKV, *apart}
    assert [name for name, row in rows.items() if row["is_fused"]] == [QKV]
    assert {row["part_of"] for name, row in rows.items() if name != QKV} == {QKV}


def test_parts_that_only_one_checkpoint_can_tell_are_not_listed(tmp_path: Path) -> None:
    fused, _ = fused_and_apart()
    base = stored(tmp_path / "base", fused, HEADS)
    trained = stored(tmp_path / "trained", stepped(fused), {})
    pairs = pair_checkpoints(base, trained)
    assert [(p.name, p.reason, p.part_of, p.is_fused) for p in pairs] == [(QKV, "", None, False)]


@pytest.mark.parametrize("other_is_fused", [True, False])
def test_overlap_is_over_tensors_that_all_three_store_alike(
    tmp_path: Path, other_is_fused: bool
) -> None:
    fused, apart = fused_and_apart()
    second = fused if other_is_fused else apart
    models = [
        stored(tmp_path / name, tensors, HEADS)
        for name, tensors in (("a", fused), ("b", stepped(fused)), ("c", stepped(second, seed=7)))
    ]
    inputs = AnalysisInputs(base=models[0], trained=models[1], other=models[2])
    rows = measure_checkpoints(inputs, tmp_path / "out")
    as_stored = [row for row in rows if row["part_of"] is None]
    assert [row["name"] for row in as_stored] == ([QKV] if other_is_fused else sorted(apart))
    assert all(row["overlap"]["status"] == "ok" for row in rows)
    assert summarize(rows)["overlap_levels"]["0"]["both"] > 0
