"""A resume notices that the data, the student or the teacher are not what the run began with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.config.schema import Config
from opd.run import inputs
from opd.run.devices import find_cards, resolved
from opd.run.folder import describe
from opd.run.inputs import fingerprint_model, write_inputs
from opd.run.preflight import check
from opd.run.recipe import Recipe, composed, find_recipe
from opd.train.checkpoints import write_checkpoint
from opd.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
QUICKSTART = find_recipe("quickstart")


@pytest.fixture
def recipe(tmp_path: Path, quickstart: Path) -> Recipe:
    shutil.copytree(quickstart, tmp_path / "models")
    data = Path(composed(QUICKSTART, []).config.data.train or "")
    shutil.copy(data, tmp_path / "train.jsonl")
    overrides = [
        f"student.model={tmp_path / 'models' / 'student'}",
        f"teacher.model={tmp_path / 'models' / 'teacher'}",
        f"data.train={tmp_path / 'train.jsonl'}",
        "teacher=local",
        "rollout=transformers",
        "launch.processes=1",
    ]
    return resolved(composed(QUICKSTART, overrides), find_cards())


def begin(recipe: Recipe, folder: Path) -> None:
    """A run with one step behind it."""
    checked = check(recipe, folder)
    assert checked.inputs.keys() >= {"data.train", "data.eval", "student.model", "teacher.model"}
    describe(recipe, folder)
    write_inputs(folder, dict(checked.inputs))
    write_checkpoint(folder, 1, lambda partial: None, keep=1, world=ALONE)


def change_a_row(config: Config) -> str:
    path = Path(str(config.data.train))
    first, *rest = path.read_text().splitlines()
    row = json.loads(first)
    field = next(name for name, value in row.items() if isinstance(value, str))
    path.write_text("\n".join([json.dumps(row | {field: row[field][::-1] + "1"}), *rest]) + "\n")
    return "data.train"


def retrain(model: str) -> None:
    path = Path(model) / "model.safetensors"
    tensors = load_file(path)
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name].view(-1)[7] += 0.5
    save_file(tensors, path, {"format": "pt"})


def change_the_student(config: Config) -> str:
    retrain(config.student.model)
    return "student.model"


def change_the_teacher(config: Config) -> str:
    retrain(str(config.teacher.model))
    return "teacher.model"


@pytest.mark.parametrize("change", [change_a_row, change_the_student, change_the_teacher])
def test_a_resume_with_other_contents_is_refused_unless_allowed(
    recipe: Recipe, tmp_path: Path, change: "object"
) -> None:
    folder = tmp_path / "run"
    begin(recipe, folder)
    assert check(recipe, folder).start == 1
    assert callable(change)
    name = change(recipe.config)
    with pytest.raises(ValueError, match=f"the contents of {name} have changed: put") as error:
        check(recipe, folder)
    assert "\n" not in str(error.value)
    allowed = composed(recipe.path, [*recipe.overrides, "run.allow_changed_inputs=true"])
    write_inputs(folder, dict(check(allowed, folder).inputs))
    assert check(recipe, folder).start == 1, "the run goes on with these from now on"


def test_blocks_of_a_large_file_of_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "BLOCK", 16)
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(5000))
    found = {fingerprint_model(str(tmp_path))}
    for place in (0, 4999, 2500):  # the first, the last and a middle block
        path.write_bytes(bytes(place) + b"1" + bytes(4999 - place))
        found.add(fingerprint_model(str(tmp_path)))
    path.write_bytes(bytes(5001))
    found.add(fingerprint_model(str(tmp_path)))
    assert len(found) >= 4
    assert fingerprint_model("no/such-model") is None
    assert fingerprint_model("!!") is None
