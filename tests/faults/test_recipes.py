"""A recipe sets values and does nothing else."""

from pathlib import Path

import pytest

from opd.cli.main import run
from opd.run.recipe import composed, find_recipe

CALLBACK = """
defaults: [{base}, _self_]
hydra:
  callbacks:
    copy: {{_target_: shutil.copyfile, src: {source}, dst: {target}}}
"""
LAUNCHER = """
defaults: [{base}, _self_]
hydra:
  launcher: {{_target_: shutil.copyfile, src: {source}, dst: {target}}}
"""


def beside_the_quickstart(tmp_path: Path, text: str, **names: object) -> Path:
    (tmp_path / "mine.yaml").write_text(find_recipe("quickstart").read_text())
    recipe = tmp_path / "evil.yaml"
    recipe.write_text(text.format(base="mine", **names))
    return recipe


@pytest.mark.parametrize("sweeps", [[], ["-m", "seed=0,1"]])
@pytest.mark.parametrize("text", [CALLBACK, LAUNCHER])
def test_a_recipe_cannot_make_hydra_call_a_function(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    sweeps: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_text("precious")
    recipe = beside_the_quickstart(tmp_path, text, source=source, target=target)
    status = run(["train", str(recipe), *sweeps, "dry_run=true"])
    assert not target.exists()
    said = capsys.readouterr().err
    assert status == 2, said
    assert said.startswith("opd: ")
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "db_password"]
)
def test_a_recipe_cannot_write_a_secret_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "hunter2")
    recipe = beside_the_quickstart(
        tmp_path, "defaults: [{base}, _self_]\nrun: {{name: '${{oc.env:" + name + "}}'}}"
    )
    with pytest.raises(ValueError, match=rf"oc\.env:{name}\}} would write a secret") as error:
        composed(recipe, [])
    assert "hunter2" not in str(error.value)


def test_a_recipe_reads_other_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    recipe = beside_the_quickstart(
        tmp_path,
        "defaults: [{base}, _self_]\n"
        "run: {{dir: '${{oc.env:SCRATCH}}/x', name: '${{oc.env:ABSENT,other}}'}}",
    )
    config = composed(recipe, []).config
    assert (config.run.dir, config.run.name) == ("/scratch/me/x", "other")
    recipe.write_text("defaults: [mine, _self_]\nrun: {name: '${oc.env:ABSENT}'}")
    with pytest.raises(ValueError, match="the variable is not set"):
        composed(recipe, [])
