"""Checkpoints that are complete or absent: written to a partial folder, listed in a manifest, renamed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from opd.world import World

MANIFEST = "manifest.json"
PARTIAL = ".partial"


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint, such as checkpoints/step_000100."""
    return run_folder / "checkpoints" / f"step_{step:06d}"


def write_checkpoint(
    run_folder: Path, step: int, save: Callable[[str], None], *, keep: int, world: World
) -> Path:
    """Call ``save`` with a partial folder, then rename that to the checkpoint; collective.

    ``save`` is called on every rank. The ``keep`` newest checkpoints stay, older ones are removed.
    Returns the checkpoint's folder.
    """
    final = checkpoint_folder(run_folder, step)
    partial = final.with_name(final.name + PARTIAL)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    save(str(partial))
    world.barrier()
    if world.is_main:
        files = {
            str(p.relative_to(partial)): p.stat().st_size
            for p in sorted(partial.rglob("*"))
            if p.is_file()
        }
        manifest = {"step": step, "processes": world.size, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoints(run_folder)[:-keep]:
            shutil.rmtree(old)
    world.barrier()
    return final


def checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (run_folder / "checkpoints").glob("step_*")
    return sorted(p for p in found if p.is_dir() and not p.name.endswith(PARTIAL))


def newest_checkpoint(run_folder: Path, *, processes: int) -> tuple[Path, int] | None:
    """The checkpoint to resume from and its step; None when there is none.

    Raises ValueError when it is cut short or was written by another number of processes.
    """
    found = checkpoints(run_folder)
    if not found:
        return None
    folder = found[-1]
    advice = (
        f"delete that folder to resume from {found[-2].name}"
        if len(found) > 1
        else "delete that folder to start again"
    )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files: dict[str, int] = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise ValueError(
            f"the checkpoint {folder} is cut short: it has no readable {MANIFEST}; {advice}"
        ) from None
    for name, size in files.items():
        path = folder / name
        found_size = path.stat().st_size if path.is_file() else None
        if found_size != size:
            fault = "is missing" if found_size is None else f"has {found_size} of {size} bytes"
            raise ValueError(f"the checkpoint {folder} is cut short: {name} {fault}; {advice}")
    if manifest["processes"] != processes:
        raise ValueError(
            f"the checkpoint {folder} was written by {manifest['processes']} processes, "
            f"found launch.processes={processes}: resume with as many, or use another run.dir"
        )
    return folder, manifest["step"]
