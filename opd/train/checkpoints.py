"""Checkpoints that are whole or absent: written aside, listed in a manifest, renamed at the end."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from opd.world import World

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """checkpoints/step_000100"""
    return run_folder / "checkpoints" / f"step_{step:06d}"


def write_checkpoint(
    run_folder: Path, step: int, save: Callable[[str], None], *, keep: int, world: World
) -> Path:
    """Call ``save`` on a folder aside, then let the checkpoint appear; the ``keep`` newest stay."""
    final = checkpoint_folder(run_folder, step)
    aside = final.with_name(final.name + PARTIAL)
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    save(str(aside))
    world.barrier()
    if world.is_main:
        files = {
            str(p.relative_to(aside)): p.stat().st_size
            for p in sorted(aside.rglob("*"))
            if p.is_file()
        }
        manifest = {"step": step, "processes": world.size, "files": files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def checkpoints(run_folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = (run_folder / "checkpoints").glob("step_*")
    return sorted(p for p in found if p.is_dir() and not p.name.endswith(PARTIAL))


def newest_checkpoint(run_folder: Path, *, processes: int) -> tuple[Path, int] | None:
    """The checkpoint to go on from and its step; None when there is none.

    Raises ValueError when it is cut short or was written by another number of processes.
    """
    found = checkpoints(run_folder)
    if not found:
        return None
    folder = found[-1]
    otherwise = (
        f"delete that folder to go on from {found[-2].name}"
        if len(found) > 1
        else "delete that folder to start again"
    )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, int] = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"the checkpoint {folder} is cut short: it has no readable {MANIFEST}; {otherwise}"
        ) from None
    for name, size in files.items():
        path = folder / name
        found_size = path.stat().st_size if path.is_file() else None
        if found_size != size:
            what = "is missing" if found_size is None else f"has {found_size} of {size} bytes"
            raise ValueError(f"the checkpoint {folder} is cut short: {name} {what}; {otherwise}")
    if manifest["processes"] != processes:
        raise ValueError(
            f"the checkpoint {folder} was written by {manifest['processes']} processes, "
            f"found launch.processes={processes}: go on with as many, or start another run.dir"
        )
    return folder, manifest["step"]
