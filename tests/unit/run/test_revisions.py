"""``name@revision`` is that commit of a model on the Hub, for every process of a run."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from opd.checkpoint.files import model_folder, split_revision
from opd.run.recipe import load_recipe
from opd.run.revisions import pinned, pinned_model

STUDENT = Path(__file__).parents[3] / "recipes" / "quickstart" / "student"
OLD, NEW = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the Hub with two commits of one model, without a network."""
    folder = tmp_path / "models--org--tiny"
    for commit in (OLD, NEW):
        shutil.copytree(STUDENT, folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    (folder / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "snapshots"


@pytest.mark.parametrize(
    ("name", "commit"), [("org/tiny", NEW), ("org/tiny@v1", OLD), (f"org/tiny@{OLD}", OLD)]
)
def test_a_revision_names_its_commit(cache: Path, name: str, commit: str) -> None:
    assert model_folder(name) == cache / commit


def test_a_folder_with_such_a_name_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny@v1").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_revision("tiny@v1") == ("tiny@v1", None)


def test_a_run_uses_and_records_the_folder_of_the_commit(cache: Path) -> None:
    recipe = pinned(load_recipe("quickstart", "student.model=org/tiny@v1"))
    assert recipe.config.student.model == str(cache / OLD)
    assert recipe.plain["student"]["model"] == str(cache / OLD)
    unpinned = load_recipe("quickstart")
    assert pinned(unpinned) is unpinned


def test_a_model_given_to_a_command_may_have_a_revision(cache: Path) -> None:
    assert pinned_model("org/tiny@v1") == str(cache / OLD)
    assert pinned_model("org/tiny") == "org/tiny"


def test_an_unknown_revision_is_one_sentence(cache: Path) -> None:
    with pytest.raises(ValueError, match="org/tiny@v9 is neither"):
        model_folder("org/tiny@v9")
