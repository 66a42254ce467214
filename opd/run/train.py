"""Runs a recipe: check, evaluate the teacher, train, report; or every combination of a sweep."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from rich.console import Console

from opd.config.launch import count_processes
from opd.config.mask import StudyMaskConfig
from opd.config.schema import problems
from opd.config.teacher import has_teacher
from opd.data.preview import preview
from opd.run.commands import engine_settings
from opd.run.devices import (
    find_cards,
    require_devices,
    require_running_servers,
    resolved,
)
from opd.run.environment import trace_processes
from opd.run.evaluate_apart import teacher_accuracy
from opd.run.folder import DRY_RUN, describe, description
from opd.run.hang import leave_on_hang
from opd.run.inputs import write_inputs
from opd.run.launch import run_processes
from opd.run.lock import hold, locked
from opd.run.mask import prepare_mask
from opd.run.place import place
from opd.run.plan_table import plan_table
from opd.run.preflight import Preflight, check
from opd.run.recipe import Recipe, composed, find_recipe, run_folder, sweep
from opd.run.results import Run
from opd.run.revisions import pinned
from opd.run.stop import STOP
from opd.run.study import run_study
from opd.run.temporary import temporary_folder
from opd.tracking.report import REPORT, compare_runs, write_report
from opd.tracking.runs import read_started_run
from opd.tracking.signs import run_warnings
from opd.tracking.terminal import comparison_table, summary_table
from opd.train.checkpoints import newest_checkpoint


def train(recipe: str | Path, *overrides: str) -> Run:
    """Train a student: one run of a recipe (a path, or the name of a bundled one) with overrides.

    An existing run folder is resumed. Progress goes to the terminal, everything else into the run
    folder. Under torchrun, accelerate launch or srun (RANK is set) this process becomes one rank and
    exits with its status. Raises ValueError with one sentence for configuration errors and
    WorkerFailed when a process of the run ended with an error.
    """
    loaded = composed(find_recipe(str(recipe)), overrides)
    if "RANK" in os.environ:
        join(loaded)
    folder = run_folder(loaded)
    run_one(loaded, folder)
    return Run(folder)


def train_all(recipe: str | Path, *overrides: str) -> list[Run]:
    """Run every combination of comma-separated overrides, each in its own folder, then compare them.

    A run that fails does not end the others; the first failure is raised at the end.
    """
    folders: list[Path] = []
    failures: list[Exception] = []

    def job(one: Recipe, name: str) -> None:
        folder = run_folder(one, name)
        folders.append(folder)
        try:
            run_one(one, folder)
        except Exception as error:  # the other jobs of the sweep continue; raised below
            if STOP():
                raise
            failures.append(error)
            print(f"opd: {folder}: {error}", file=sys.stderr)

    sweep(find_recipe(str(recipe)), overrides, job)
    finished = [folder for folder in folders if (folder / "final").is_dir()]
    if finished:
        compare(finished, folders[0].parent)
    if failures:
        raise failures[0]
    return [Run(folder) for folder in finished]


def run_one(recipe: Recipe, folder: Path) -> None:
    """Check, train and report one run; with ``dry_run`` only check and print the plan."""
    recipe = resolved(pinned(recipe), find_cards())
    if recipe.config.dry_run:
        _dry_run(recipe, folder)
        return
    with STOP.handle_signals(), locked(folder), temporary_folder(folder):
        _run_locked(recipe, folder)


def _dry_run(recipe: Recipe, folder: Path) -> None:
    console = Console(markup=False)
    checked = check(recipe, folder)
    console.print(plan_table(recipe, checked, folder))
    _print_first_prompt(console, recipe, checked)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DRY_RUN).write_text(description(recipe))
    console.print("dry run: everything that can be checked before training is in order")
    console.print(f"resolved configuration: {folder / DRY_RUN}")


def _run_locked(recipe: Recipe, folder: Path) -> None:
    console = Console(markup=False)
    checked = check(recipe, folder)
    console.print(plan_table(recipe, checked, folder))
    describe(recipe, folder)
    write_inputs(folder, checked.inputs)
    if isinstance(recipe.config.mask, StudyMaskConfig) and recipe.config.mask.arms:
        run_study(recipe, checked.placement, folder, run_one)
        return
    if checked.start >= recipe.config.train.steps and (folder / "final").is_dir():
        console.print(f"the run is complete: {folder}")
        if not (folder / REPORT).is_file():
            write_report(folder)
    else:
        prepare_mask(recipe, folder, run_one)
        accuracy = teacher_accuracy(recipe, folder / "logs") if checked.start == 0 else None
        assert checked.prompts is not None
        run_processes(
            recipe,
            checked.placement,
            folder,
            max_length=checked.prompts.max_length,
            teacher_accuracy=accuracy,
        )
    console.print(summary_table(folder))
    console.print(f"report: {folder / 'report.html'}")


def _print_first_prompt(console: Console, recipe: Recipe, checked: Preflight) -> None:
    if checked.prompts is None or checked.tokenizer is None:
        return
    lines = preview(
        checked.prompts, checked.tokenizer.tokenizer, teacher=has_teacher(recipe.config)
    )
    for line in lines:  # a prompt may hold what Rich takes for its own markup
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def join(recipe: Recipe) -> NoReturn:
    """Run one rank of a run that another launcher started; rank 0 checks and describes the run."""
    from opd.run.worker import leave_after  # loads the libraries of training

    recipe = joined_recipe(recipe)
    folder = run_folder(recipe)
    first = os.environ["RANK"] == "0"
    if recipe.config.dry_run:
        if first:
            run_one(recipe, folder)
        raise SystemExit
    if first:
        hold(folder)
        checked = check(recipe, folder)
        if checked.start and newest_checkpoint(folder) is None:
            raise ValueError(f"the run is complete and its checkpoints are gone: {folder}")
        describe(recipe, folder)
        write_inputs(folder, checked.inputs)
        prepare_mask(recipe, folder, _cannot_run_first)
    config = recipe.config
    ranks = count_processes(config)
    trace_processes(config, folder)
    leave_on_hang(folder, int(os.environ["RANK"]), ranks, config.launch.deadlines)
    leave_after(recipe)


def joined_recipe(recipe: Recipe) -> Recipe:
    """The recipe of a rank that another launcher started, with the number of ranks and its engine's share.

    Raises ValueError where this run cannot be started in this way.
    """
    cards = find_cards()
    recipe = resolved(pinned(recipe), cards)
    config = recipe.config
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))
    require_devices(config, cards)
    require_running_servers(config)
    settings = engine_settings(config, place(config, cards))
    return composed(recipe.path, [*recipe.overrides, *settings]) if settings else recipe


def _cannot_run_first(recipe: Recipe, folder: Path) -> None:
    raise ValueError(
        "this mask needs a training run before this one, which only `opd train` itself starts: make the "
        "mask with `opd mask discover` and use mask=file, or use launch.processes=N without a launcher"
    )


def print_config(recipe: str | Path, *overrides: str) -> None:
    """The composed configuration as YAML."""
    print(yaml.safe_dump(composed(find_recipe(str(recipe)), overrides).plain, sort_keys=False))


def compare(folders: Sequence[Path], out: Path) -> None:
    """Print the runs as a table; write comparison.html and comparison.csv into ``out``."""
    page, table = compare_runs(folders, out)
    console = Console(markup=False)
    console.print(comparison_table(folders))
    for run in map(read_started_run, folders):
        for sentence in run_warnings(run):
            console.print(f"warning: {run.name}: {sentence}", soft_wrap=True)
    console.print(f"report: {page}\ntable:  {table}")
