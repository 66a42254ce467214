"""Checkpoints that are complete or absent: written to a partial folder, listed in a manifest, renamed."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from opd.checked_json import read_json
from opd.checkpoint.full_disk import full_disk_explained
from opd.checkpoint.whole_folder import (
    PARTIAL,
    checksums,
    partial_path,
    put_in_place,
    write_whole,
)
from opd.config.save import BestMetric
from opd.world import World

MANIFEST = "manifest.json"
BEST = "best"
DAMAGED = "damaged_"
"""Start of the name of a checkpoint that was set aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself: its files with their sizes in bytes and SHA-256 checksums."""

    step: int
    processes: int
    sizes: dict[str, int]
    checksums: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _StoredManifest:
    """A manifest as it is written; checkpoints of older versions have no checksums."""

    step: int
    processes: int
    files: dict[str, int]
    sha256: dict[str, str] = field(default_factory=dict)


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """The folder of a step's checkpoint, such as checkpoints/step_000100."""
    return run_folder / "checkpoints" / f"step_{step:06d}"


class BestCheckpoint:
    """Which checkpoint is best by a metric: named in checkpoints/best.json, linked as checkpoints/best."""

    def __init__(self, run_folder: Path, metric: BestMetric) -> None:
        self._folder = run_folder / "checkpoints"
        self._metric = metric

    def needs_saving(self, metrics: Mapping[str, float]) -> bool:
        """Whether a step with ``metrics`` was evaluated, and is better than the best checkpoint."""
        return self._metric.name.startswith("eval/") and self.improves(metrics)

    def improves(self, metrics: Mapping[str, float]) -> bool:
        """Whether a step with ``metrics`` is better than the best checkpoint, or the first that has one."""
        value, best = metrics.get(self._metric.name), self._read()
        if value is None or not math.isfinite(value):
            return False
        if best is None or best["metric"] != self._metric.name:
            return True
        return value > best["value"] if self._metric.highest else value < best["value"]

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Make the checkpoint of ``step`` the best one, if it is."""
        if not self.improves(metrics):
            return
        name = self._metric.name
        best = {"step": step, "metric": name, "value": metrics[name]}
        write_whole(self._folder / f"{BEST}.json", json.dumps(best) + "\n")
        link = self._folder / BEST
        if link.is_dir() and not link.is_symlink():  # a copy of the run that followed the link
            shutil.rmtree(link)
        partial = partial_path(link)
        partial.unlink(missing_ok=True)
        partial.symlink_to(f"step_{step:06d}")
        partial.replace(link)

    @property
    def folder(self) -> Path | None:
        """The best checkpoint."""
        best = self._read()
        return None if best is None else checkpoint_folder(self._folder.parent, best["step"])

    def _read(self) -> dict[str, Any] | None:
        """None when there is none, or what is named is not there any more."""
        try:
            best = json.loads((self._folder / f"{BEST}.json").read_text())
            is_there = checkpoint_folder(self._folder.parent, best["step"]).is_dir()
            return {**best, "value": float(best["value"])} if is_there else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def write_checkpoint(
    run_folder: Path,
    step: int,
    save: Callable[[str], None],
    *,
    keep: int,
    world: World,
    best: BestCheckpoint | None = None,
    metrics: Mapping[str, float] = MappingProxyType({}),
) -> Path:
    """Call ``save`` with a partial folder, then rename that to the checkpoint; collective.

    ``save`` is called on every rank. The ``keep`` newest checkpoints and the best by the ``metrics`` of
    their steps stay, older ones are removed. Returns the checkpoint's folder.
    """
    final = checkpoint_folder(run_folder, step)
    partial = partial_path(final)
    if world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    with _whole_or_nothing(run_folder, step, partial):
        save(str(partial))
        world.barrier()
        if world.is_main:
            _write_manifest(partial, step, world.size)
            put_in_place(partial, final)
    if world.is_main:
        if best is not None:
            best.record(step, metrics)
        for old in checkpoints(run_folder)[:-keep]:
            if best is None or old != best.folder:
                shutil.rmtree(old)
    world.barrier()
    return final


@contextmanager
def _whole_or_nothing(run_folder: Path, step: int, partial: Path) -> Iterator[None]:
    """Inside, a checkpoint is written; a full disk is a RunError, and nothing of the checkpoint stays."""
    earlier = checkpoints(run_folder)
    needed = sum(read_manifest(earlier[-1]).sizes.values()) if earlier else None
    kept = f"the checkpoint {earlier[-1].name} is whole" if earlier else "no step is saved"
    remedy = f"{kept}: free some space, and the same command goes on from there"
    what = f"the checkpoint of step {step}"
    try:
        with full_disk_explained(what, run_folder, needed=needed, remedy=remedy):
            yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_partial(run_folder: Path) -> None:
    """Remove what checkpoints that were not finished have left."""
    for partial in (run_folder / "checkpoints").glob(f"*{PARTIAL}"):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def checkpoints(run_folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (run_folder / "checkpoints").glob("step_*")
    return sorted(p for p in found if p.is_dir() and not p.name.endswith(PARTIAL))


def newest_checkpoint(run_folder: Path) -> tuple[Path, int] | None:
    """The checkpoint to resume from and its step; None when there is none.

    Raises ValueError when it is cut short.
    """
    found = checkpoints(run_folder)
    if not found:
        return None
    folder = found[-1]
    fault = _incomplete(folder)
    if fault is not None:
        raise ValueError(f"the checkpoint {folder} is cut short: {fault}; {_advice(found)}")
    return folder, read_manifest(folder).step


def set_damaged_aside(run_folder: Path) -> list[str]:
    """Rename damaged checkpoints that are newer than the newest sound one; a sentence for each.

    A checkpoint is damaged when a file is missing, is cut short, or has other contents than the manifest
    says. Raises ValueError when none is sound.
    """
    found = checkpoints(run_folder)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(found):
        fault = _incomplete(folder) or _altered(folder)
        if fault is None:
            break
        damaged.append((folder, fault))
    if damaged and len(damaged) == len(found):
        folder, fault = damaged[0]
        raise ValueError(
            f"the checkpoint {folder} is damaged: {fault}, and no older one is sound; delete "
            f"{folder.parent} to start again"
        )
    sentences = []
    for folder, fault in damaged:
        aside = folder.with_name(DAMAGED + folder.name)
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        sentences.append(
            f"the checkpoint {folder} is damaged ({fault}): it is now {aside.name}, and the run "
            f"resumes from {found[-1 - len(damaged)].name}"
        )
    return sentences


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; ValueError when it has none that can be read."""
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise ValueError(f"it has no readable {MANIFEST} ({error})") from None
    found = read_json(content, _StoredManifest, f"its {MANIFEST}", "it cannot be used")
    if folder.name != f"step_{found.step:06d}":
        raise ValueError(f"its {MANIFEST} is of another checkpoint, step {found.step}")
    return Manifest(
        step=found.step, processes=found.processes, sizes=found.files, checksums=found.sha256
    )


def _write_manifest(folder: Path, step: int, processes: int) -> None:
    sums = checksums(folder)
    sizes = {name: (folder / name).stat().st_size for name in sums}
    manifest = {"step": step, "processes": processes, "files": sizes, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _incomplete(folder: Path) -> str | None:
    """What is missing of a checkpoint, by its manifest and the sizes of its files."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error)
    for name, size in manifest.sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} of {size} bytes"
    return None


def _altered(folder: Path) -> str | None:
    """Which file of a complete checkpoint has other contents than its manifest says."""
    found = checksums(folder)
    for name, digest in read_manifest(folder).checksums.items():
        if found[name] != digest:
            return f"the checksum of {name} is not the manifest's"
    return None


def _advice(found: list[Path]) -> str:
    if len(found) > 1:
        return f"delete that folder to resume from {found[-2].name}"
    return "delete that folder to start again"
