"""What a run folder survives: damaged files, a half-written model, a second command, a lost checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opd.checkpoint.whole_folder import checksums, whole_folder, write_whole
from opd.cli.main import run
from opd.run.folder import describe, open_folder
from opd.run.lock import LOCK, lock_descriptors, locked
from opd.run.recipe import composed, find_recipe
from opd.train.checkpoints import (
    MANIFEST,
    checkpoint_folder,
    checkpoints,
    newest_checkpoint,
    set_damaged_aside,
    write_checkpoint,
)
from opd.world import World

ALONE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
QUICKSTART = find_recipe("quickstart")
TINY = "launch.processes=1"


def write_steps(folder: Path, *steps: int) -> None:
    def save(partial: str) -> None:
        (Path(partial) / "deepspeed").mkdir()
        (Path(partial) / "deepspeed" / "weights.bin").write_bytes(os.urandom(4096))
        (Path(partial) / "rank_0.pt").write_bytes(b"state")

    for step in steps:
        write_checkpoint(folder, step, save, keep=9, world=ALONE)


def flip_a_bit(folder: Path) -> None:
    path = folder / "deepspeed" / "weights.bin"
    data = bytearray(path.read_bytes())
    data[1234] ^= 4
    path.write_bytes(bytes(data))


def cut_short(folder: Path) -> None:
    os.truncate(folder / "rank_0.pt", 3)


def lose_a_file(folder: Path) -> None:
    (folder / "rank_0.pt").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def change_the_step(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"step": 99}))


def scramble_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('["step", 4]')


DAMAGES = [
    flip_a_bit, cut_short, lose_a_file, lose_the_manifest, change_the_step, scramble_the_manifest,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    write_steps(tmp_path, 2, 4)
    damage(checkpoint_folder(tmp_path, 4))
    (sentence,) = set_damaged_aside(tmp_path)
    assert "step_000004 is damaged" in sentence
    assert "resumes from step_000002" in sentence
    assert "\n" not in sentence
    assert newest_checkpoint(tmp_path) == (checkpoint_folder(tmp_path, 2), 2)
    assert (tmp_path / "checkpoints" / "damaged_step_000004").is_dir(), "nothing is deleted"
    assert set_damaged_aside(tmp_path) == []


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_without_a_sound_checkpoint_is_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    write_steps(tmp_path, 2, 4)
    for step in (2, 4):
        damage(checkpoint_folder(tmp_path, step))
    with pytest.raises(ValueError, match="no older one is sound"):
        set_damaged_aside(tmp_path)
    assert len(checkpoints(tmp_path)) == 2


def test_every_single_flipped_byte_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    newest = checkpoint_folder(tmp_path, 2)
    generator = torch.Generator().manual_seed(0)
    for name in checksums(newest):
        if name == MANIFEST:
            continue
        whole = (newest / name).read_bytes()
        for place in torch.randint(len(whole), (40,), generator=generator).tolist():
            changed = bytearray(whole)
            changed[place] ^= 1 << (place % 8)
            (newest / name).write_bytes(bytes(changed))
            assert set_damaged_aside(tmp_path), (name, place)
            (newest.parent / "damaged_step_000002").rename(newest)
            (newest / name).write_bytes(whole)
    assert set_damaged_aside(tmp_path) == []


def test_a_dry_run_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "quickstart"
    describe(composed(QUICKSTART, [TINY]), folder)
    write_steps(folder, 2, 4)
    cut_short(checkpoint_folder(folder, 4))
    assert run(["train", "quickstart", TINY, "dry_run=true"]) == 2
    assert len(checkpoints(folder)) == 2


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "final"

    def write(*, fails: bool) -> None:
        with whole_folder(target) as partial:
            assert list(partial.iterdir()) == [], "what a failed attempt left is gone"
            (partial / "config.json").write_text("{}")
            if fails:
                raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(fails=True)
    assert not target.exists()
    write(fails=False)
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_a_text_file_is_the_former_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    write_whole(path, "before")

    def no_space(self: Path, text: str, **_: object) -> int:
        self.write_bytes(text[:3].encode())
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", no_space)
        with pytest.raises(OSError, match="No space"):
            write_whole(path, "after")
    assert path.read_text() == "before"


HOLDER = """
import sys, time
from pathlib import Path
from opd.run.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_command_in_a_folder_is_refused_by_name_and_a_dead_owner_is_no_owner(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=rf"in use by process {owner.pid} on \S+ since 20") as error,
        locked(folder),
    ):
        pytest.fail("two owners")
    assert "\n" not in str(error.value)
    owner.kill()
    owner.wait()
    assert (folder / LOCK).exists(), "a stale lock"
    with locked(folder):
        (folder / "kept").touch()
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"), locked(folder):
            pytest.fail("two owners")
    assert [p.name for p in folder.iterdir()] == ["kept"]


def test_a_child_holds_the_lock_of_its_parent_while_it_lives(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=lock_descriptors()
        )
        path = tmp_path / "run" / LOCK
        path.rename(path.with_name("kept"))
    path.with_name("kept").rename(path)  # as a killed parent leaves it
    with pytest.raises(ValueError, match="is in use by"), locked(tmp_path / "run"):
        pytest.fail("two owners")
    child.kill()
    child.wait()
    with locked(tmp_path / "run"):
        assert lock_descriptors()
    assert not lock_descriptors()


def test_a_folder_that_was_only_locked_does_not_stay(tmp_path: Path) -> None:
    with locked(tmp_path / "runs" / "one"):
        pass
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "one").mkdir(parents=True)
    with locked(tmp_path / "runs" / "one"):
        pass
    assert (tmp_path / "runs" / "one").exists(), "it was there before"


def finished_run(folder: Path, *, steps: int) -> None:
    describe(composed(QUICKSTART, [TINY, f"train.steps={steps}"]), folder)
    rows = [json.dumps({"step": step, "loss/total": 0.5}) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")


def test_a_finished_run_whose_checkpoints_are_gone_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "quickstart"
    finished_run(folder, steps=3)
    before = (folder / "metrics.jsonl").read_text()
    command = ["train", "quickstart", TINY, "train.steps=3"]
    assert run(command) == 0
    assert "the run is complete" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_text() == before
    assert (folder / "report.html").is_file(), "a report that was lost is written again"
    assert not (folder / LOCK).exists()


def test_a_finished_run_cannot_go_on_without_its_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finished_run(folder, steps=3)
    longer = [TINY, "train.steps=6", "optim.schedule=constant"]
    describe(composed(QUICKSTART, longer), folder)
    with pytest.raises(ValueError, match=r"no checkpoint, so it cannot go on to train\.steps=6"):
        open_folder(composed(QUICKSTART, longer), folder)
    shutil.rmtree(folder / "final")
    assert open_folder(composed(QUICKSTART, longer), folder) == 0
