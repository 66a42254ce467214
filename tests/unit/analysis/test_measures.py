"""Every number agrees with a plain float64 computation of its definition."""

import math
from pathlib import Path
from typing import Any

import dense
import numpy as np
import pytest
import torch
from pairs import Tensors, renamed, stepped, stored, weights

from opd.analysis.largest import Largest, counted, large_first
from opd.analysis.measure import Row
from opd.analysis.summary import summary
from opd.analysis.walk import Question, walked

EXACT, DECOMPOSED = 1e-6, 1e-4


def rows_of(folder: Path, base: Tensors, trained: Tensors, **config: Any) -> dict[str, Row]:
    a, b = stored(folder / "a", base, config), stored(folder / "b", trained, config)
    return {row["name"]: row for row in walked(Question(base=a, trained=b), folder / "out")}


def off_grid(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(4)
    return {
        n: w.float() * (1 + 1e-3 * torch.rand(w.shape, generator=generator))
        for n, w in tensors.items()
    }


PAIRS = {
    "bf16": (weights(), stepped(weights())),
    "bf16, moved far": (weights(), stepped(weights(), scale=2e-3)),
    "fp32": (off_grid(weights()), stepped(off_grid(weights()), dtype=torch.float32)),
    "bf16 and fp32": (weights(), stepped(weights(), dtype=torch.float32)),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("precision", ["bf16", "stored"])
def test_numbers_of_a_tensor_are_the_dense_ones(kind: str, precision: str, tmp_path: Path) -> None:
    base, trained = PAIRS[kind]
    rows = rows_of(tmp_path, base, trained)
    assert set(rows) == set(base)
    is_stored = precision == "stored" and not kind.startswith("bf16, ") and kind != "bf16"
    for name, row in rows.items():
        mine = row[precision]
        pair = (base[name], trained[name], is_stored)
        expected = dense.coordinates(*pair)
        assert mine["relative_norm"] == pytest.approx(expected["relative_norm"], rel=EXACT)
        assert mine["zero"] / row["numel"] == pytest.approx(expected["zero"], rel=EXACT)
        for counts in ("below", "relative_below"):
            shares = {k: v / row["numel"] for k, v in mine[counts].items()}
            assert shares == pytest.approx(expected[counts], rel=EXACT)
        assert mine["top"] == pytest.approx(expected["top"], rel=EXACT)
        if base[name].dim() == 2:
            agrees(mine["spectrum"], dense.spectral(*pair), DECOMPOSED)
            found = {
                r: {m: {c: cell[c]["coverage"] for c in ("0", "1e-5")} for m, cell in masks.items()}
                for r, masks in mine["coverage"].items()
            }
            agrees(found, dense.coverage(*pair), EXACT)


def agrees(found: Any, expected: Any, rel: float) -> None:
    if isinstance(expected, dict):
        for key, value in expected.items():
            agrees(found[key], value, rel)
    else:
        assert found == pytest.approx(expected, rel=rel)


def test_paper_numbers_pool_tensors_as_the_paper_does(tmp_path: Path) -> None:
    base, trained = PAIRS["bf16"]
    found = summary(list(rows_of(tmp_path, base, trained).values()))["paper"]
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
    found = summary(list(rows_of(tmp_path, base, trained).values()))
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


def test_the_largest_are_exact_among_ties_and_across_pieces() -> None:
    values = np.random.default_rng(0).integers(0, 40, 5000).astype(np.float32) / 7
    for count in (1, 50, 777, 5000):
        largest = Largest(count)
        for start in range(0, 5000, 600):
            largest.add(counted(large_first(values[start : start + 600])))
        chosen = np.zeros(5000, bool)
        for start in range(0, 5000, 600):
            keys = large_first(values[start : start + 600])
            chosen[start : start + 600] = largest.certain(keys, start)
        chosen[largest.rest()] = True
        assert set(np.flatnonzero(chosen)) == set(np.argsort(-values, kind="stable")[:count])


def test_rank_deficient_and_zero_matrices_have_numbers(tmp_path: Path) -> None:
    thin = torch.randn(40, 2).bfloat16().float() @ torch.randn(2, 24)
    base = {"a.weight": thin, "b.weight": torch.zeros(30, 20)}
    trained = {"a.weight": thin + 1e-3 * torch.randn(40, 24), "b.weight": torch.ones(30, 20)}
    rows = rows_of(tmp_path, base, trained)
    assert [row["status"] for row in rows.values()] == ["ok", "ok"]
    expected = dense.spectral(base["a.weight"], trained["a.weight"], stored=True)
    found = rows["a.weight"]["stored"]["spectrum"]
    assert found["stable_rank"] == pytest.approx(expected["stable_rank"], rel=DECOMPOSED)
    assert rows["b.weight"]["bf16"]["spectrum"]["stable_rank"] == pytest.approx(1, rel=1e-6)
