"""``spectrum=fast``: every figure is within its bound of the exact one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.analysis.fast import (
    _bound_eigenvalues,
    _bound_rest,
    _larger_eigenvalue,
    bound_leading_values,
)
from opd.analysis.formatting import Spectrum, interpret
from opd.analysis.sides import NumberFormat, Sides
from opd.analysis.summary import summarize
from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from opd.cli.main import run
from tests.unit.analysis.pairs import Tensors, stepped, stored, weights

SHAPES = {
    "model.embed_tokens.weight": (900, 300),
    "model.layers.0.self_attn.q_proj.weight": (320, 320),
    "model.layers.0.self_attn.k_proj.weight": (40, 320),
    "model.layers.0.mlp.down_proj.weight": (260, 700),
    "model.layers.0.input_layernorm.weight": (320,),
}


def concentrated(base: Tensors, rank: int = 5, noise: float = 2e-5) -> Tensors:
    """A step along a few directions, and a little everywhere."""
    generator = torch.Generator().manual_seed(5)
    moved = {}
    for name, w in base.items():
        d = noise * torch.randn(w.shape, generator=generator)
        if w.dim() == 2:
            u, v = (torch.randn(n, rank, generator=generator) for n in w.shape)
            d += 1e-4 * (u * 0.7 ** torch.arange(rank)) @ v.T
        moved[name] = w.float() + d
    return moved


UPDATES = {
    "isotropic": lambda base: stepped(base, dtype=torch.float32),
    "concentrated": concentrated,
    "five directions": lambda base: concentrated(base, noise=0.0),
}


@pytest.mark.parametrize("kind", UPDATES)
def test_singular_values_lie_between_their_bounds(kind: str) -> None:
    base = weights(shapes=SHAPES)
    for name, trained in UPDATES[kind](base).items():
        if trained.dim() < 2:
            continue
        sides = Sides(base=base[name], trained=trained, precision=NumberFormat.stored)
        found = bound_leading_values(sides)
        update = (trained - base[name].float()).double().numpy()
        exact = np.linalg.svd(update, compute_uv=False)[: len(found.least)]
        room = 1e-6 * exact[0]
        assert len(exact) == min(64, *update.shape)
        assert (found.least <= exact + room).all()
        assert (exact <= found.most + room).all()
        assert found.most[0] < 1.6 * exact[0]
        if kind != "isotropic":
            assert found.most[0] == pytest.approx(exact[0], rel=1e-6)


@pytest.mark.parametrize("kind", UPDATES)
def test_figures_are_within_their_bounds_of_the_exact_ones(kind: str, tmp_path: Path) -> None:
    base = weights(shapes=SHAPES)
    a, b = stored(tmp_path / "a", base), stored(tmp_path / "b", UPDATES[kind](base))
    found = {
        how: {
            row["name"]: row
            for row in measure_checkpoints(
                AnalysisInputs(base=a, trained=b, spectrum=how), tmp_path / how.value
            )
        }
        for how in Spectrum
    }
    looked = 0
    for name, row in found[Spectrum.fast].items():
        for precision in ("bf16", "stored"):
            if "spectrum" not in row[precision]:
                continue
            mine = row[precision]["spectrum"]
            exact = found[Spectrum.exact][name][precision]["spectrum"]
            for key, bound in mine["bound"].items():
                assert abs(mine[key] - exact[key]) <= bound + 1e-7 * exact[key]
                looked += 1
    assert looked == 2 * 4 * 8
    fast, exact = (summarize(list(found[how].values())) for how in (Spectrum.fast, Spectrum.exact))
    for key, middle in (("16", "mean"), ("16", "median")):
        off = abs(
            fast["paper"]["top_energy"][key][middle] - exact["paper"]["top_energy"][key][middle]
        )
        assert off <= fast["spectrum"]["bounds"]["energy_16"][middle] + 1e-7
    off = abs(fast["paper"]["stable_rank"]["median"] - exact["paper"]["stable_rank"]["median"])
    assert off <= fast["spectrum"]["bounds"]["stable_rank"]["median"] * (1 + 1e-7)


def test_what_needs_whole_spectra_is_left_out_and_said(tmp_path: Path) -> None:
    base = weights(shapes=SHAPES)
    stored(tmp_path / "a", base)
    stored(tmp_path / "b", stepped(base))
    words = [f"base={tmp_path}/a", f"trained={tmp_path}/b", f"out={tmp_path}/out"]
    assert run(["analyze", *words, "spectrum=fast"]) == 0
    found = json.loads((tmp_path / "out/summary.json").read_text())
    assert found["spectrum"]["method"] == "fast"
    paper = found["paper"]
    assert paper["stable_rank"]["median"] > 20
    assert paper["coverage"]["low_magnitude"]["10%"]["1e-5"]["mean"] > 0
    for left_out in (
        paper["effective_rank"],
        paper["spectral_drift"],
        paper["principal_projection"]["10%"],
        paper["coverage"]["principal"]["10%"]["1e-5"],
    ):
        assert left_out["mean"] is None
    sentence = next(line for line in interpret(found) if "spectrum=fast" in line)
    assert sentence in (tmp_path / "out/report.md").read_text()
    from pyarrow import parquet

    columns = parquet.read_table(tmp_path / "out/tensors.parquet").column_names
    assert "bf16/spectrum/bound/energy_16" in columns
    assert "bf16/spectrum/bound/stable_rank" in columns


def test_the_same_folder_does_not_mix_methods(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = weights()
    stored(tmp_path / "a", base)
    stored(tmp_path / "b", stepped(base))
    words = [f"base={tmp_path}/a", f"trained={tmp_path}/b", f"out={tmp_path}/out"]
    assert run(["analyze", *words]) == 0
    assert run(["analyze", *words, "spectrum=fast"]) == 2
    assert "spectrum=" in capsys.readouterr().err


def test_coupled_blocks_have_the_larger_eigenvalue_of_two_numbers() -> None:
    a, c, b = (torch.tensor(v, dtype=torch.float64) for v in (3.0, 2.0, 1.0))
    expected = np.linalg.eigvalsh([[3, 2], [2, 1]])[1]
    assert float(_larger_eigenvalue(a, c**2, b)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", UPDATES)
def test_witnesses_tell_what_a_space_misses(kind: str) -> None:
    base = weights(shapes=SHAPES)
    name = "model.layers.0.mlp.down_proj.weight"
    trained = UPDATES[kind](base)[name]
    sides = Sides(base=base[name], trained=trained, precision=NumberFormat.stored)
    update = (trained - base[name].float()).double()
    basis = torch.eye(260, 40, dtype=torch.float64)
    rest = update[40:] @ update[40:].T
    largest = float(torch.linalg.eigvalsh(rest)[-1])
    found = [_bound_rest(sides, basis, torch.Generator().manual_seed(seed)) for seed in range(10)]
    assert largest < min(found)
    assert max(found) < 2.5 * largest


def test_a_space_that_missed_the_leading_direction_is_not_believed() -> None:
    squares = torch.tensor([4.0, 1.0], dtype=torch.float64)
    missed = torch.zeros(2, dtype=torch.float64)
    assert _bound_eigenvalues(squares, missed, 0.0).tolist() == [4, 1]
    assert _bound_eigenvalues(squares, missed, 9.0).tolist() == [9, 9]
