"""Every number of a tensor agrees with a plain float64 computation of its definition."""

from pathlib import Path

import pytest
import torch

from tests.unit.analysis import dense
from tests.unit.analysis.dense import DECOMPOSED, EXACT, agrees
from tests.unit.analysis.pairs import PAIRS, rows_of


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
