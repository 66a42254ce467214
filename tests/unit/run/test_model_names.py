"""Models are named by folder, hub id, run, checkpoint or recipe."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd.cli import main
from opd.run.export import export
from opd.run.folder import describe
from opd.run.model_names import given_base, opened_model, recipe_of, resolved_model, run_of
from opd.run.recipe import load_recipe

REPOSITORY = Path(__file__).parents[3]
STUDENT = REPOSITORY / "recipes" / "quickstart" / "student"
EVALUATION = {"eval/addition/accuracy": 0.25, "eval/addition/teacher_accuracy": 1.0}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run, and its last checkpoint as far as names go."""
    folder = tmp_path / "runs" / "x"
    describe(load_recipe("quickstart", "loss=jsd", "train.steps=2"), folder)
    rows = [
        {"step": 0, **EVALUATION},
        {"step": 1, "loss/total": 1.0, "eval/addition/accuracy": 0.5},
        {"step": 2, "loss/total": 0.5, "eval/addition/accuracy": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(STUDENT, folder / "final")
    checkpoint = folder / "checkpoints" / "step_000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    return folder


def test_a_run_is_its_final_model_and_a_recipe_its_student(run: Path) -> None:
    assert resolved_model(str(run)) == str(run / "final")
    assert resolved_model("quickstart") == str(STUDENT)
    assert resolved_model(str(REPOSITORY / "recipes" / "quickstart.yaml")) == str(STUDENT)
    for other in ("org/name", str(STUDENT), str(run / "final")):
        assert resolved_model(other) == other
    with opened_model(str(run)) as folder:
        assert folder == str(run / "final")


@pytest.mark.parametrize("part", ["", "final", "checkpoints/step_000002", "checkpoints/best"])
def test_the_default_base_and_recipe_are_those_of_the_run(run: Path, part: str) -> None:
    (run / "checkpoints" / "best").symlink_to("step_000002")
    model = str(run / part)
    assert run_of(model) == run
    assert recipe_of(model, "seed=3").choices["loss"] == "jsd"
    assert recipe_of(model, "seed=3").config.seed == 3
    assert given_base(None, model) == str(STUDENT)
    assert given_base("quickstart", model) == str(STUDENT)


def test_what_cannot_be_used_is_one_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"base=\.\.\. is missing, and trained=.* is no run"):
        given_base(None, str(STUDENT))
    with pytest.raises(ValueError, match=r"opd export model=.*step_000002 out=FOLDER"):
        resolved_model(str(run / "checkpoints" / "step_000002"))
    with pytest.raises(ValueError, match="found neither a run folder nor a checkpoint"):
        export(str(STUDENT), tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(ValueError, match="already exists"):
        export(str(run), tmp_path / "out")
    shutil.rmtree(run / "final")
    with pytest.raises(ValueError, match="no final/ yet: let it finish, or name one of its"):
        resolved_model(str(run))


def test_an_exported_run_has_a_card_with_recipe_data_and_figures(run: Path, tmp_path: Path) -> None:
    assert main.run(["export", f"model={run}", f"out={tmp_path / 'out'}"]) == 0
    found, expected = (load_file(f / "model.safetensors") for f in (tmp_path / "out", STUDENT))
    assert all(found[name].equal(expected[name]) for name in expected)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "loss: jsd" in card
    assert "quickstart/train.jsonl" in card
    assert "| addition | accuracy | 0.2500 | 0.7500 | 1.0000 |" in card


def test_eval_needs_a_recipe_or_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["eval"]) == 2
    assert "RECIPE is missing: usage: opd eval" in capsys.readouterr().err
    assert main.run(["eval", f"model={STUDENT}"]) == 2
    assert "so it has no recipe: name one" in capsys.readouterr().err
