"""The run folder: what a dry run leaves in it, and whose it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import opd
from opd.cli.main import run
from opd.mask.file import RUN_MASK
from opd.run.devices import find_cards, resolved
from opd.run.folder import CONFIG, DRY_RUN, describe, open_folder
from opd.run.recipe import Recipe, composed, find_recipe
from opd.train.checkpoints import write_checkpoint
from opd.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
QUICKSTART = find_recipe("quickstart")


def quickstart(*overrides: str) -> Recipe:
    return resolved(composed(QUICKSTART, overrides), find_cards())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_dry_run_leaves_its_description_and_nothing_else(tmp_path: Path) -> None:
    assert run(["train", "quickstart", "loss=jsd", "dry_run=true"]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [tmp_path / "runs" / "quickstart" / "dry_run.yaml"]
    written = yaml.safe_load(files[0].read_text())
    assert written["config"] == quickstart("loss=jsd", "dry_run=true").plain
    assert written["config"]["optim"]["lr"] > 0, "resolved, not as the recipe spells it"
    assert written["choices"]["loss"] == "jsd"
    assert {"opd", "python", "torch"} <= set(written["versions"])


@pytest.mark.parametrize(("rank", "files"), [("0", ["dry_run.yaml"]), ("1", [])])
def test_a_dry_run_under_another_launcher_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, files: list[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        run(["train", "quickstart", "teacher=local", "dry_run=true"])
    assert not left.value.code
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == files


def test_a_real_run_may_follow_a_dry_run_in_its_folder() -> None:
    folder = Path("runs/quickstart")
    assert run(["train", "quickstart", "dry_run=true"]) == 0
    recipe = quickstart()
    assert open_folder(recipe, folder) == 0
    describe(recipe, folder)
    assert open_folder(recipe, folder) == 0
    assert run(["train", "quickstart", "dry_run=true"]) == 0, "a dry run of a run that is there"


def test_a_dry_run_of_another_recipe_claims_nothing() -> None:
    folder = Path("runs/quickstart")
    assert run(["train", "quickstart", "loss=jsd", "dry_run=true"]) == 0
    assert open_folder(quickstart("loss=forward_kl"), folder) == 0


def test_a_folder_with_other_files_is_refused_even_after_a_dry_run() -> None:
    folder = Path("runs/quickstart")
    assert run(["train", "quickstart", "dry_run=true"]) == 0
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="so it is not a run"):
        open_folder(quickstart(), folder)


def test_the_api_s_dry_run_is_a_run_with_a_configuration_and_no_more() -> None:
    dry = opd.train("quickstart", "optim.lr=1e-4", "dry_run=true")
    assert dry.status == "dry run"
    assert dry.config["optim"]["lr"] == 1e-4
    with pytest.raises(ValueError, match=f"found no {CONFIG}"):
        _ = dry.record
    with pytest.raises(ValueError, match="has no final/ yet"):
        _ = dry.final
    (dry.folder / DRY_RUN).unlink()
    with pytest.raises(ValueError, match=f"found no {CONFIG}"):
        opd.Run(dry.folder)


def started(*overrides: str) -> Path:
    """The folder of a run that was described and took no step."""
    folder = Path("runs/quickstart")
    describe(quickstart(*overrides), folder)
    (folder / "logs").mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval/heldout/accuracy": 0.3}\n')
    return folder


def log_a_step(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "loss/total": 0.5}\n')


def leave_a_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)


def leave_a_model(folder: Path) -> None:
    (folder / "final").mkdir()


def leave_a_first_run(folder: Path) -> None:
    (folder / "full").mkdir()


@pytest.mark.parametrize(
    "leave", [log_a_step, leave_a_checkpoint, leave_a_model, leave_a_first_run]
)
def test_a_run_with_other_settings_is_refused_by_name(leave: Callable[[Path], None]) -> None:
    folder = started()
    leave(folder)
    with pytest.raises(ValueError, match=r"belongs to another run: it has .*loss"):
        open_folder(quickstart("loss=jsd"), folder)


def test_a_run_with_steps_may_still_change_how_it_is_watched() -> None:
    folder = started()
    log_a_step(folder)
    assert open_folder(quickstart("eval.every=7"), folder) == 0


@pytest.mark.parametrize(
    "corrected", ["loss=jsd", "student.attn_implementation=eager", "optim.lr=3e-4", "teacher=local"]
)
def test_a_setting_of_a_run_without_a_step_may_be_corrected(corrected: str) -> None:
    folder = started()
    recipe = quickstart(corrected)
    assert open_folder(recipe, folder) == 0
    describe(recipe, folder)
    assert yaml.safe_load((folder / CONFIG).read_text())["config"] == recipe.plain


def test_a_correction_removes_the_mask_of_the_former_settings() -> None:
    folder = started()
    (folder / RUN_MASK).write_bytes(b"made before")
    describe(quickstart("eval.every=7"), folder)
    assert (folder / RUN_MASK).exists(), "the same run"
    corrected = quickstart("optim.lr=3e-4")
    assert open_folder(corrected, folder) == 0
    assert (folder / RUN_MASK).exists(), "a check changes nothing"
    describe(corrected, folder)
    assert not (folder / RUN_MASK).exists()


def test_a_configuration_that_cannot_be_read_is_refused() -> None:
    folder = started()
    (folder / CONFIG).write_text("nonsense")
    with pytest.raises(ValueError, match="not readable: give another"):
        open_folder(quickstart(), folder)


def test_a_run_may_go_on_with_another_division_which_is_noted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = started()
    log_a_step(folder)
    write_checkpoint(folder, 1, lambda partial: None, keep=1, world=ALONE)
    number = quickstart().config.launch.processes
    assert open_folder(quickstart("launch.processes=7", "zero=3"), folder) == 1
    noted = capsys.readouterr().err
    assert f"of step 1 was written with launch.processes={number}, zero=1: its states" in noted
    assert open_folder(quickstart(), folder) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "changed",
    [
        "rollout.gpu_memory_utilization=0.2",
        "teacher.gpu_memory_utilization=0.2",
        "teacher.tensor_parallel_size=2",
        "teacher.devices=1",
        "launch.cpu_processes=1 launch.processes=2",
    ],
)
def test_a_run_with_steps_may_be_placed_otherwise(changed: str) -> None:
    folder = started("launch.processes=2")
    log_a_step(folder)
    assert open_folder(quickstart("launch.processes=2", *changed.split()), folder) == 0
