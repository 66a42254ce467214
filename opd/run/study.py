"""The two-stage study: train every weight, discover a mask, retrain on it and on control masks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from opd.config.mask import MaskRule, StudyArm, StudyMaskConfig
from opd.mask.file import RUN_MASK
from opd.run.commands import engine_settings
from opd.run.mask import RunJob
from opd.run.placement import Placement
from opd.run.recipe import Recipe, composed
from opd.run.teacher_servers import started_teachers
from opd.tracking.runs import RunRecord, read_run
from opd.tracking.study_report import Arms, arms_table, study_measures, write_arms

NO_RULE = (
    "mask.density=null",
    "mask.threshold=null",
    "mask.budget=global",
    "mask.structure=coordinates",
    "mask.trained=null",
    "mask.scores=null",
    "mask.exclude=[]",
)
"""Overrides of a control, which copies the counts of the discovered mask and needs no rule settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run of the study."""

    arm: StudyArm
    seed: int
    folder: Path
    overrides: list[str]


def study_jobs(recipe: Recipe, folder: Path) -> list[Job]:
    """The runs of a study, ordered so that each run finds what it needs from earlier ones.

    Raises ValueError when an arm lacks the arm that its mask comes from.
    """
    mask = recipe.config.mask
    assert isinstance(mask, StudyMaskConfig)
    arms = [arm for arm in StudyArm if arm in mask.arms]
    needs_full = mask.rule == MaskRule.delta and mask.trained is None
    if StudyArm.discovered in arms and needs_full and StudyArm.full not in arms:
        raise ValueError(
            "mask.arms has discovered without full, whose update is the mask: add full"
        )
    controls = {StudyArm.random, StudyArm.magnitude_matched} & set(arms)
    if controls and StudyArm.discovered not in arms:
        raise ValueError(
            f"mask.arms has {sorted(controls)[0]} without discovered, whose counts it copies: add it"
        )
    return [
        Job(
            arm=arm,
            seed=seed,
            folder=folder / f"seed_{seed}" / arm.value,
            overrides=[
                *recipe.overrides,
                "mask.arms=[]",
                f"seed={seed}",
                f"mask.seed={seed}",
                *_arm_overrides(arm, recipe, folder / f"seed_{seed}"),
                *(
                    []
                    if (arm, seed) == (arms[0], mask.seeds[0])
                    else ["eval.teacher_accuracy=false"]
                ),
            ],
        )
        for seed in mask.seeds
        for arm in arms
    ]


def _arm_overrides(arm: StudyArm, recipe: Recipe, seed_folder: Path) -> list[str]:
    mask = recipe.config.mask
    assert isinstance(mask, StudyMaskConfig)
    like = seed_folder / StudyArm.discovered.value / RUN_MASK
    lr = f"optim.lr={recipe.config.optim.lr * mask.lr_scale!r}"
    masked = [lr] if mask.lr_scale != 1 else []
    match arm:
        case StudyArm.full:
            return ["mask.enabled=false"]
        case StudyArm.discovered:
            full = seed_folder / StudyArm.full.value
            comes_from_full = mask.rule == MaskRule.delta and mask.trained is None
            return [*masked, *([f"mask.trained='{full}'"] if comes_from_full else [])]
        case StudyArm.random | StudyArm.magnitude_matched:
            return [*masked, *NO_RULE, f"mask.rule={arm.value}", f"mask.like='{like}'"]


def run_study(recipe: Recipe, placement: Placement, folder: Path, run: RunJob) -> None:
    """Run every arm for every seed, then write a table and a plot; finished runs are not run again."""
    console = Console(markup=False)
    jobs = study_jobs(recipe, folder)
    with _shared_teacher(recipe, placement, folder / "logs") as teacher:
        for number, job in enumerate(jobs, start=1):
            console.rule(f"run {number} of {len(jobs)}: {job.arm.value}, seed {job.seed}")
            run(composed(recipe.path, [*job.overrides, *teacher]), job.folder)
    arms = study_arms(recipe, jobs)
    console.print(arms_table(arms))
    for difference in arms.differences():
        console.print(f"- {difference.sentence}", highlight=False)
    for path in write_arms(arms, folder, _title(recipe)):
        console.print(f"{path.suffix.removeprefix('.'):5} {path}", highlight=False)


def study_arms(recipe: Recipe, jobs: list[Job]) -> Arms:
    """The finished runs by arm and seed; the discovered mask is compared with each other arm."""
    runs: dict[str, dict[int, RunRecord]] = {}
    for job in jobs:
        runs.setdefault(job.arm.value, {})[job.seed] = read_run(job.folder)
    mask = StudyArm.discovered.value
    pairs = [(mask, arm) for arm in runs if arm != mask] if mask in runs else []
    return Arms(runs=runs, measures=study_measures(recipe.config.eval.task), pairs=pairs)


def _title(recipe: Recipe) -> str:
    mask = recipe.config.mask
    assert isinstance(mask, StudyMaskConfig)
    size = f"density {mask.density:g}" if mask.density else f"threshold {mask.threshold:g}"
    return f"{recipe.config.run.name}: mask by {mask.rule.value}, {size}"


@contextmanager
def _shared_teacher(recipe: Recipe, placement: Placement, logs: Path) -> Iterator[list[str]]:
    """Teacher servers shared by all runs; yields the overrides with their addresses.

    The runs see the GPUs that the placement gives to more than teachers, and their engines keep their share.
    """
    logs.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    with started_teachers(recipe.config, placement, logs) as teachers:
        if not teachers.settings:
            yield []
            return
        try:
            os.environ |= teachers.environment | placement.cards.visible(placement.beside_teachers)
            yield [*teachers.settings, *engine_settings(recipe.config, placement)]
        finally:
            os.environ.clear()
            os.environ.update(before)
