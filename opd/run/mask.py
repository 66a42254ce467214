"""The mask of a run: written to the run folder before training, discovered first where necessary."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from opd.checkpoint.tensors import open_checkpoint
from opd.config.mask import (
    LIVE_RULES,
    DiscoverMaskConfig,
    FileMaskConfig,
    MaskRule,
    RuleConfig,
    active_mask,
    require_valid_rule,
)
from opd.mask.discover import Summary, discover_mask
from opd.mask.file import RUN_MASK
from opd.mask.mask import Mask
from opd.run.folder import took_a_step
from opd.run.recipe import Recipe, composed

RunJob = Callable[[Recipe, Path], None]
FIRST_RUN, SCORED_RUN = "full", "scored"
"""Folders, inside the run folder, of the runs before the mask can be computed."""
SCORES = "scores.safetensors"
"""File in the run folder that holds the scores of a live rule."""
ONLY_SCORES = ("data.eval=null", "eval.kl_prompts=0", "save.every=0", "sync.verify_every=0")
"""Overrides of a run that only computes scores: no evaluation, no checkpoints."""


def require_mask_fits(recipe: Recipe, folder: Path) -> None:
    """ValueError when the mask of a recipe cannot be found or does not belong to its student."""
    config = recipe.config
    match active_mask(config):
        case FileMaskConfig(path=str(path)):
            mask = Mask.read(path)
            base = open_checkpoint(config.student.model)
            mask.require_base(base.fingerprint(), config.student.model)
            mask.require_parameters(base.parameters.shapes)
            kept = folder / RUN_MASK
            is_started = kept.exists() and took_a_step(folder)
            if is_started and Mask.read(kept).fingerprint() != mask.fingerprint():
                raise ValueError(
                    f"the run {folder} was started with another mask than {path}: give another "
                    "run.dir, or the mask it was started with"
                )
            if not any(mask.counts().values()):
                raise ValueError(f"the mask {path} keeps no weights: there is nothing to train")
        case DiscoverMaskConfig() as discover:
            rule = discover.rule_config()
            if rule.rule == MaskRule.delta and rule.trained is None:
                rule.trained = FIRST_RUN
            if rule.rule in LIVE_RULES and rule.scores is None:
                rule.scores = SCORED_RUN
            require_valid_rule(rule)


def prepare_mask(recipe: Recipe, folder: Path, run: RunJob) -> None:
    """Write mask.safetensors into the run folder; runs that the rule needs come first, inside it.

    rule=delta without mask.trained trains every weight first; rules that score a live run train for
    mask.steps steps. Both resume where they were interrupted.
    """
    target = folder / RUN_MASK
    match active_mask(recipe.config):
        case None:
            return
        case FileMaskConfig(path=str(path)):
            if not (target.exists() and took_a_step(folder)):
                Mask.read(path).save(target)
        case DiscoverMaskConfig() as discover:
            if not target.exists():
                _discover(recipe, discover.rule_config(), target, run)


def _discover(recipe: Recipe, rule: RuleConfig, target: Path, run: RunJob) -> None:
    console = Console(markup=False)
    if rule.rule == MaskRule.delta and rule.trained is None:
        first = target.parent / FIRST_RUN
        console.print(f"training every weight first, in {first}")
        run(composed(recipe.path, [*recipe.overrides, "mask.enabled=false"]), first)
        rule = replace(rule, trained=str(first))
    if rule.rule in LIVE_RULES and rule.scores is None:
        scored = target.parent / SCORED_RUN
        rule = replace(rule, scores=str(score(recipe, rule.rule, rule.steps, scored, run)))
    summary = discover_mask(
        open_checkpoint(recipe.config.student.model),
        rule,
        target,
        like=None if rule.like is None else Mask.read(rule.like),
        command=shlex.join(["opd", "train", recipe.path.stem, *recipe.overrides]),
    )
    console.print(describe_mask(summary))
    for warning in summary.warnings:
        console.print(f"warning: {warning}")


def describe_mask(summary: Summary) -> str:
    """One line about a discovered mask."""
    return f"{summary.path}: {summary.kept:,} of {summary.numel:,} weights ({summary.density:.4%})"


def score(recipe: Recipe, rule: MaskRule, steps: int, folder: Path, run: RunJob) -> Path:
    """The file of scores that ``rule`` computes from ``steps`` optimizer steps of a recipe."""
    config = recipe.config
    steps = 1 if rule == MaskRule.first_gradient else min(steps, config.train.steps)
    overrides = [
        *recipe.overrides,
        *ONLY_SCORES,
        f"train.mask_scores={rule.value}",
        f"train.stop_after={steps}",
        f"zero={max(1, config.zero)}",
    ]
    if recipe.choices["mask"] != "none":
        overrides.append("mask.enabled=false")
    if rule in (MaskRule.fisher, MaskRule.first_gradient):
        overrides.append("optim.max_grad_norm=0")
    Console(markup=False).print(
        f"computing {rule.value} scores over {steps} steps of training, in {folder}"
    )
    run(composed(recipe.path, overrides), folder)
    return folder / SCORES
