"""The mask of a run: put into the run folder before training starts, found first if need be."""

import shlex
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console

from opd import build
from opd.run.recipe import Composed, composed
from opd.run.worker import SCORES
from opd.config.masks import DiscoverMaskConfig, FileMaskConfig, MaskRule, RuleConfig
from opd.config.rules import active_mask
from opd.mask.settings import WATCHED, require_sound

RunJob = Callable[[Composed, Path], None]
FIRST_RUN, WATCHED_RUN = "full", "watched"
"""Folders, inside the run's, of what is run before the mask can be found."""
PLAIN = ("data.eval=null", "eval.kl_prompts=0", "save.every=0", "sync.verify_every=0")
"""A run that is only watched examines nothing."""


def rule_of(config: DiscoverMaskConfig) -> RuleConfig:
    """The rule's own settings."""
    return RuleConfig(**{f.name: getattr(config, f.name) for f in fields(RuleConfig)})


def require_mask_fits(recipe: Composed, folder: Path) -> None:
    """ValueError when the mask of a recipe cannot be found or does not belong to its student."""
    from opd.mask.mask import read_mask
    from opd.checkpoint.tensors import open_checkpoint

    config = recipe.config
    match active_mask(config):
        case FileMaskConfig(path=str(path)):
            mask = read_mask(Path(path))
            base = open_checkpoint(config.student.model)
            mask.require_base(base.fingerprint(), config.student.model)
            mask.require_parameters(base.shapes)
            kept = folder / build.RUN_MASK
            if kept.exists() and read_mask(kept).fingerprint() != mask.fingerprint():
                raise ValueError(
                    f"the run {folder} was started with another mask than {path}: give another "
                    "run.dir, or the mask it was started with"
                )
            if not any(mask.counts().values()):
                raise ValueError(f"the mask {path} keeps nothing: there is nothing to train")
        case DiscoverMaskConfig() as discover:
            rule = rule_of(discover)
            if rule.rule == MaskRule.delta and rule.trained is None:
                rule.trained = FIRST_RUN
            if rule.rule in WATCHED and rule.scores is None:
                rule.scores = WATCHED_RUN
            require_sound(rule)


def prepare_mask(recipe: Composed, folder: Path, run: RunJob) -> None:
    """Leave mask.safetensors in the run folder; what a rule has to see is run first, inside it.

    rule=delta without mask.trained trains everything first; rules that watch run mask.steps steps.
    Both go on where they were interrupted.
    """
    from opd.mask.mask import read_mask

    target = folder / build.RUN_MASK
    match active_mask(recipe.config):
        case None:
            return
        case FileMaskConfig(path=str(path)):
            if not target.exists():
                read_mask(Path(path)).save(target)
        case DiscoverMaskConfig() as discover:
            if not target.exists():
                _discover(recipe, rule_of(discover), target, run)


def _discover(recipe: Composed, rule: RuleConfig, target: Path, run: RunJob) -> None:
    from opd.cli.mask_tables import discovered
    from opd.mask.discover import discover_mask
    from opd.checkpoint.tensors import open_checkpoint

    console = Console()
    if rule.rule == MaskRule.delta and rule.trained is None:
        first = target.parent / FIRST_RUN
        console.print(f"first everything is trained, in {first}")
        run(composed(recipe.recipe, [*recipe.overrides, "mask.enabled=false"]), first)
        rule = replace(rule, trained=str(first))
    if rule.rule in WATCHED and rule.scores is None:
        watched = target.parent / WATCHED_RUN
        rule = replace(rule, scores=str(watch(recipe, rule.rule, rule.steps, watched, run)))
    summary = discover_mask(
        open_checkpoint(recipe.config.student.model),
        rule,
        target,
        command=shlex.join(["opd", "train", recipe.recipe.stem, *recipe.overrides]),
    )
    console.print(discovered(summary))
    for warning in summary.warnings:
        console.print(f"warning: {warning}")


def watch(recipe: Composed, rule: MaskRule, steps: int, folder: Path, run: RunJob) -> Path:
    """The file of scores that a rule finds by watching ``steps`` optimizer steps of a recipe."""
    config = recipe.config
    steps = 1 if rule == MaskRule.first_gradient else min(steps, config.train.steps)
    overrides = [
        *recipe.overrides,
        *PLAIN,
        f"train.scores={rule.value}",
        f"train.stop_after={steps}",
        f"zero={max(1, config.zero)}",
    ]
    if recipe.choices["mask"] != "none":
        overrides.append("mask.enabled=false")
    if rule in (MaskRule.fisher, MaskRule.first_gradient):
        overrides.append("optim.clip=0")
    Console().print(f"{rule.value} watches {steps} steps, in {folder}")
    run(composed(recipe.recipe, overrides), folder)
    return folder / SCORES
