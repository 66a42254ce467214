"""Figures of the whole model pool tensors as the paper does."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.analysis.summary import summary
from tests.unit.analysis import dense
from tests.unit.analysis.dense import DECOMPOSED, EXACT
from tests.unit.analysis.pairs import PAIRS, rows_of


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
