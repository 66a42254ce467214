"""Figures of the whole model pool tensors as the paper does."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opd.analysis.summary import summarize
from tests.unit.analysis import dense
from tests.unit.analysis.dense import DECOMPOSED, EXACT, agrees
from tests.unit.analysis.pairs import PAIRS, rows_of, stepped, weights


def test_paper_numbers_pool_tensors_as_the_paper_does(tmp_path: Path) -> None:
    base, trained = PAIRS["bf16"]
    found = summarize(list(rows_of(tmp_path, base, trained).values()))["paper"]
    d = {n: dense.difference(base[n], trained[n]) for n in base}
    moves = np.concatenate([np.abs(x).ravel() for x in d.values()])
    norm = math.sqrt(sum((w.double() ** 2).sum() for w in base.values()))
    assert found["relative_norm"] == pytest.approx(np.linalg.norm(moves) / norm, rel=EXACT)
    assert found["exact_zero"] == pytest.approx((moves == 0).mean(), rel=EXACT)
    assert found["sparsity"]["1e-5"] == pytest.approx((moves < 1e-5).mean(), rel=EXACT)
    top = sum(dense.coordinates(base[n], trained[n])["top"]["1%"] for n in base)
    assert found["coordinate_energy"]["1%"] == pytest.approx(top / (moves**2).sum(), rel=EXACT)
    matrices = [n for n in base if base[n].dim() == 2 and d[n].any()]
    spectra = [dense.spectral(base[n], trained[n]) for n in matrices]
    ranks = [s["stable_rank"] for s in spectra]
    assert found["stable_rank"]["mean"] == pytest.approx(np.mean(ranks), rel=DECOMPOSED)
    assert found["stable_rank"]["median"] == pytest.approx(np.median(ranks), rel=DECOMPOSED)
    covered = [
        dense.coverage(base[n], trained[n])["10%"]["low_magnitude"]["1e-5"] for n in matrices
    ]
    changed = [int((np.abs(d[n]) > 1e-5).sum()) for n in matrices]
    mine = found["coverage"]["low_magnitude"]["10%"]["1e-5"]
    assert mine["mean"] == pytest.approx(np.mean(covered), rel=EXACT)
    assert mine["update_weighted_mean"] == pytest.approx(
        np.average(covered, weights=changed), rel=EXACT
    )
    ffn = sum((d[n] ** 2).sum() for n in base if "mlp" in n)
    assert found["energy_share"]["ffn"] == pytest.approx(ffn / (moves**2).sum(), rel=EXACT)


def test_five_ways_to_count_change(tmp_path: Path) -> None:
    base, trained = PAIRS["bf16 and fp32"]
    found = summarize(list(rows_of(tmp_path, base, trained).values()))
    before = torch.cat([w.flatten() for w in base.values()])
    after = torch.cat([w.flatten() for w in trained.values()])
    seen = before.view(torch.int16) != after.bfloat16().view(torch.int16)
    change = found["change"]
    assert change["bf16"]["bitwise"] == pytest.approx(seen.double().mean().item())
    assert change["bf16"]["relative_rule"] == pytest.approx(change["bf16"]["bitwise"])
    assert change["stored"]["bitwise"] == pytest.approx(
        (before.float() != after).double().mean().item()
    )
    steps = change["bf16"]["spacings_moved"]
    assert steps["0"] == pytest.approx(1 - change["bf16"]["bitwise"])
    assert sum(steps.values()) == pytest.approx(1)
    x, y = (after.bfloat16() - before).double(), after.double() - before.double()
    assert found["visible_of_true"]["energy_ratio"] == pytest.approx(((x @ x) / (y @ y)).item())


VISION = {
    "model.visual.patch_embed.proj.weight": (32, 3, 2, 4, 4),
    "model.visual.blocks.0.attn.qkv.weight": (96, 32),
    "model.visual.blocks.0.attn.qkv.bias": (96,),
    "model.visual.blocks.0.attn.proj.weight": (32, 32),
    "model.visual.blocks.0.mlp.gate_proj.weight": (64, 32),
    "model.visual.blocks.0.norm1.weight": (32,),
    "model.visual.blocks.1.downsample.weight": (16, 32, 3, 3),
    "model.visual.merger.ln_q.weight": (32,),
    "model.language_model.embed_tokens.weight": (120, 48),
    "model.language_model.layers.0.self_attn.q_proj.weight": (48, 48),
    "model.language_model.layers.0.self_attn.k_proj.bias": (16,),
    "model.language_model.layers.0.mlp.experts.gate_up_proj": (3, 40, 48),
    "model.language_model.layers.0.mlp.experts.down_proj": (3, 48, 20),
    "model.language_model.norm.weight": (48,),
    "lm_head.weight": (120, 48),
}
BLOCKS_OF_THE_PAPER = {
    "ffn": ("mlp.gate_proj", "mlp.down_proj", "experts.gate_up_proj", "experts.down_proj"),
    "attention": ("q_proj", "k_proj"),
    "embedding": ("embed_tokens",),
    "lm_head": ("lm_head",),
    "norm": ("norm", "ln_q"),
    "other": ("patch_embed", "attn.qkv", "attn.proj", "downsample"),
}


def blocks(names: Iterable[str]) -> dict[str, str]:
    """The block of each name; every name has exactly one."""
    found = {
        name: [b for b, tokens in BLOCKS_OF_THE_PAPER.items() if any(t in name for t in tokens)]
        for name in names
    }
    assert all(len(each) == 1 for each in found.values()), found
    return {name: each[0] for name, each in found.items()}


@pytest.mark.parametrize("kind", ["text", "vision and language"])
def test_every_figure_of_the_paper_is_over_tensors_as_stored(tmp_path: Path, kind: str) -> None:
    base = weights() if kind == "text" else weights(shapes=VISION)
    trained = stepped(base)
    rows = list(rows_of(tmp_path, base, trained, moe_intermediate_size=20).values())
    assert all(row["status"] == "ok" for row in rows)
    found = summarize(rows)
    expected = dense.paper(base, trained, blocks(base))
    agrees(found["paper"], expected, DECOMPOSED)
    assert shape(found["paper"]) == shape(expected)
    assert found["tensors"]["measured"] == len(base)


def test_tables_are_over_the_parts_of_fused_tensors(tmp_path: Path) -> None:
    base = weights(shapes=VISION)
    rows = rows_of(tmp_path, base, stepped(base), moe_intermediate_size=20)
    found = summarize(list(rows.values()))
    numel = sum(w.numel() for w in base.values())
    for table in ("block", "module", "layer"):
        assert sum(group["numel"] for group in found[table].values()) == numel
        assert sum(group["energy_share"] for group in found[table].values()) == pytest.approx(1)
    assert {"vision.q", "vision.k", "vision.v", "gate_proj", "up_proj"} <= set(found["module"])
    assert not {"vision.qkv", "experts.gate_up_proj"} & set(found["module"])
    parts = [rows[f"visual.blocks.0.attn.{part}.weight"] for part in "qkv"]
    whole = rows["visual.blocks.0.attn.qkv.weight"]
    assert {part["part_of"] for part in parts} == {whole["name"]}
    assert whole["is_fused"]
    assert sum(part["bf16"]["zero"] for part in parts) == whole["bf16"]["zero"]
    ranks = [part["bf16"]["spectrum"]["stable_rank"] for part in parts]
    assert found["module"]["vision.k"]["stable_rank"] == ranks[1]
    assert whole["bf16"]["spectrum"]["stable_rank"] not in ranks


def shape(tree: Any) -> Any:
    """The keys of nested dictionaries."""
    return {key: shape(value) for key, value in tree.items()} if isinstance(tree, dict) else None
