"""``opd analyze`` answers, goes on where it was stopped, and says in a sentence why it cannot."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import opd.analysis.walk as walk
from opd.cli.main import run
from tests.unit.analysis.pairs import Tensors, stepped, stored, weights


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(tmp_path / "base", weights())
    stored(tmp_path / "trained", stepped(weights()))
    monkeypatch.chdir(tmp_path)


def analyze(*words: str) -> int:
    return run(["analyze", "base=base", "out=out", *words])


def read(out: str = "out") -> Any:
    return json.loads(Path(out, "summary.json").read_text())


def trained_with(name: str, change: Any) -> str:
    tensors: Tensors = stepped(weights())
    tensors[name] = change(tensors[name].clone())
    return "trained=" + stored(Path("changed"), {n: t for n, t in tensors.items() if t is not None})


def test_it_writes_a_summary_tables_pictures_and_a_report(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stored(Path("second"), stepped(weights(), seed=7))
    assert analyze("trained=trained", "other=second") == 0
    assert "stable rank" in capsys.readouterr().out
    found = read()
    for part in ("paper", "null", "excess", "z"):
        assert set(found[part]) == set(found["paper"])
    assert set(found["paper"]["overlap"]) == {
        "a_covered_by_b",
        "b_covered_by_a",
        "jaccard",
        "random_a_covered_by_b",
        "random_b_covered_by_a",
    }
    from pyarrow import parquet

    assert parquet.read_table("out/tensors.parquet").num_rows == len(weights())
    assert len(Path("out/tensors.csv").read_text().splitlines()) == len(weights()) + 1
    page = Path("out/report.html").read_text()
    drawn = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert (
        len(drawn)
        == len(list(Path("out").glob("*.png")))
        == len(list(Path("out").glob("*.svg")))
        >= 5
    )
    for svg in drawn:  # text and lines have the colours of the page, light or dark
        assert "var(--ink)" in svg
        assert not re.search(r"#333333|#dddddd|#000000", svg)
    assert "<img" not in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "| observed |" in Path("out/report.md").read_text()


def test_a_run_folder_means_its_final_model() -> None:
    stored(Path("run/final"), stepped(weights()), {"tie_word_embeddings": True})
    Path("run/metrics.jsonl").touch()
    assert analyze("trained=run") == 0
    assert read()["tensors"]["measured"] == len(weights())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_are_a_row_and_not_the_end(
    value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 3] = value
        return tensor

    name = "model.layers.0.mlp.down_proj.weight"
    assert analyze(trained_with(name, spoil)) == 0
    left = read()["tensors"]["left_out"]
    assert left == {name: "1 NaN or infinite values in the trained model"}
    assert name in capsys.readouterr().out


def test_missing_and_misshapen_tensors_are_rows() -> None:
    first, second = "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    tensors = stepped(weights())
    tensors[second] = tensors[second][:8]
    del tensors[first]
    assert analyze("trained=" + stored(Path("changed"), tensors)) == 0
    assert read()["tensors"]["left_out"] == {
        first: "only in the base",
        second: "shape [16, 48] in the base, [8, 48] in the trained model",
    }
    rows = Path("out/tensors.csv").read_text()
    assert first in rows
    assert second in rows


def test_another_architecture_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    stored(Path("foreign"), {"transformer.h.0.attn.c_attn.weight": torch.ones(4, 4)})
    assert analyze("trained=foreign") == 2
    error = capsys.readouterr().err
    assert error.startswith("opd: no tensor of foreign compares with one of base")
    assert error.count("\n") == 1


def test_a_shard_cut_short_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("trained/model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert analyze("trained=trained") == 2
    error = capsys.readouterr().err
    assert "model.safetensors cannot be read" in error
    assert error.count("\n") == 1


def test_unknown_keys_and_missing_ones_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze("trained=trained", "othr=x") == 2
    assert "did you mean other?" in capsys.readouterr().err
    assert analyze() == 2
    assert "trained=... is missing" in capsys.readouterr().err


def test_an_interrupted_analysis_goes_on_and_ends_as_if_it_had_not_been(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert analyze("trained=trained") == 0
    whole = Path("out/summary.json").read_text()
    Path("out").rename("uninterrupted")
    real, calls = walk.measure_pair, []

    def stops(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(walk, "measure_pair", stops)
    assert analyze("trained=trained") == 1
    rows = Path("out/tensors.jsonl")
    rows.write_bytes(rows.read_bytes()[:-30])
    assert analyze("trained=trained") == 0
    assert len(calls) < 2 * len(weights())
    assert Path("out/summary.json").read_text() == whole
    assert sorted(rows.read_text().splitlines()) == sorted(
        Path("uninterrupted/tensors.jsonl").read_text().splitlines()
    )


def test_a_folder_of_another_pair_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert analyze("trained=trained") == 0
    stored(Path("second"), stepped(weights(), seed=7))
    assert analyze("trained=second") == 2
    assert "out holds the analysis of another pair" in capsys.readouterr().err


def test_a_mistake_in_pruning_is_said_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert analyze("trained=trained", "prune=nosuch") == 2
    assert "there is no recipe named nosuch" in capsys.readouterr().err
    assert analyze("trained=trained", "prune=quickstart", "shares=[2]") == 2
    assert "allowed are numbers from 0 to 1" in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spectrum", ["exact", "fast"])
def test_a_model_beside_itself_has_a_report(spectrum: str) -> None:
    assert analyze("trained=base", f"spectrum={spectrum}") == 0
    assert read()["paper"]["exact_zero"] == 1
    assert Path("out/report.html").is_file()
