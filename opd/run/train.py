"""``opd train``: compose with Hydra, check, start, and end with a table."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from opd import build
from opd.run.preflight import check, hub_answers, hub_names, plan_table
from opd.run.recipe import (
    Composed,
    composed,
    find_recipe,
    hydra_arguments,
    prepare,
    run_folder,
    typed,
    with_method,
)
from opd.run.evaluate import teacher_accuracy
from opd.run.folder import describe
from opd.run.launch import keep_freed_memory, run_processes
from opd.run.mask import prepare_mask
from opd.run.self_check import doctors_self_loss
from opd.run.study import run_study
from opd.run.worker import leave_after
from opd.config.masks import StudyMaskConfig


def train(recipe_name: str, overrides: Sequence[str], *, multirun: bool) -> None:
    """Run one job, or with ``multirun`` every combination, each in a folder of its own.

    Under torchrun, accelerate launch or srun (RANK is set) this process is one rank of one job.
    """
    recipe, overrides = find_recipe(recipe_name), with_method(overrides)
    if "RANK" in os.environ:
        join(composed(recipe, overrides))
    prepare(recipe)
    folders: list[Path] = []
    failures: list[Exception] = []

    def job(cfg: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        own = list(hydra_config.overrides.task)
        swept = hydra_config.mode == RunMode.MULTIRUN
        name = job_name(own, overrides, hydra_config.job.num) if swept else None
        if with_method(own) == own:
            one = typed(cfg, hydra_config.runtime.choices, recipe, own)
        else:
            one = composed(recipe, own)
        folder = run_folder(one, name)
        folders.append(folder)
        try:
            run(one, folder)
        except Exception as error:  # the other jobs of a sweep go on; raised below
            failures.append(error)
            if multirun:
                print(f"opd: {folder}: {error}", file=sys.stderr)

    command_line = sys.argv
    flag = ["--multirun"] if multirun else []
    sys.argv = ["opd train", *flag, *hydra_arguments(recipe), *overrides]
    try:
        hydra.main(version_base="1.3", config_path=None)(job)()
    finally:
        sys.argv = command_line
    finished = [f for f in folders if (f / "final").is_dir()]
    if multirun and finished:
        print_comparison(finished, folders[0].parent)
    if failures:
        raise failures[0]


def join(recipe: Composed) -> NoReturn:
    """Be one rank of a run that another launcher started; rank 0 checks and describes it."""
    if os.environ["RANK"] == "0":
        check(recipe, run_folder(recipe))
        describe(recipe, run_folder(recipe))
        prepare_mask(recipe, run_folder(recipe), _cannot_run_first)
    leave_after(recipe)


def _cannot_run_first(recipe: Composed, folder: Path) -> None:
    raise ValueError(
        "this mask needs a run before the run, which only `opd train` itself starts: make it with "
        "`opd mask discover` and use mask=file, or launch with launch.processes=N"
    )


def job_name(own: Sequence[str], given: Sequence[str], number: int) -> str:
    """What is particular to a job of a sweep, as a folder name: optim=sgd,optim.lr=0.01"""
    common = {o.lower() for o in given}  # Hydra writes false as False
    particular = [o for o in own if o.lower() not in common]
    return ",".join(particular).replace("/", "_") or f"job_{number}"


def run(recipe: Composed, folder: Path) -> None:
    """Check, train and report one run; with ``dry_run`` only check and say what would be done."""
    from opd.tracking.terminal import summary_table

    console = Console()
    checked = check(recipe, folder)
    console.print(plan_table(recipe, checked, folder))
    if recipe.config.dry_run:
        console.print("dry run: everything that can be checked before training is in order")
        return
    describe(recipe, folder)
    keep_freed_memory()
    if isinstance(recipe.config.mask, StudyMaskConfig) and recipe.config.mask.arms:
        run_study(recipe, folder, run)
        return
    if checked.start >= recipe.config.train.steps and (folder / "final").is_dir():
        console.print(f"the run is complete: {folder}")
    else:
        prepare_mask(recipe, folder, run)
        accuracy = teacher_accuracy(recipe, folder / "logs") if checked.start == 0 else None
        assert checked.prompts is not None
        run_processes(recipe, folder, max_length=checked.prompts.max_length, accuracy=accuracy)
    console.print(summary_table(folder))
    console.print(f"report: {folder / 'report.html'}")


def doctor(recipe_name: str, overrides: Sequence[str]) -> None:
    """A dry run, and the student scored by itself where that is cheap."""
    train(recipe_name, [*overrides, "dry_run=true"], multirun=False)
    config = composed(find_recipe(recipe_name), overrides).config
    if hub_names(config) and not hub_answers():
        return
    text = build.build_text(
        config.student.model, trust_remote_code=config.student.trust_remote_code
    )
    loss = doctors_self_loss(config, text, build.build_prompts(config, text))
    if loss is None:
        print("the student scored by itself: not computed here, the run does it at its start")
    else:
        print(f"the student scored by itself: loss {loss:.2g} nats a token, as it should be")


def print_config(recipe_name: str, overrides: Sequence[str]) -> None:
    """The composed configuration as YAML."""
    import yaml

    print(yaml.safe_dump(composed(find_recipe(recipe_name), overrides).plain, sort_keys=False))


def print_comparison(folders: Sequence[Path], out: Path) -> None:
    """The runs as a table here, and as comparison.html and comparison.csv in ``out``."""
    from opd.tracking.report import compare_runs
    from opd.tracking.terminal import comparison_table

    page, table = compare_runs(folders, out)
    console = Console()
    console.print(comparison_table(folders))
    console.print(f"report: {page}\ntable:  {table}")
