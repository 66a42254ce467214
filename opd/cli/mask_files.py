"""``opd mask discover | show | compare | combine``."""

import json
import shlex
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import MISSING
from rich.console import Console

from opd.checkpoint.tensors import open_checkpoint
from opd.cli.grammar import parse_command_line
from opd.cli.mask_tables import (
    comparison_json,
    comparison_tables,
    description_json,
    description_tables,
    discovery_table,
)
from opd.cli.progress import progress_bar
from opd.config.arguments import parse_arguments, split_arguments
from opd.config.mask import LIVE_RULES, RuleConfig, require_valid_rule
from opd.mask.compare import compare as compare_masks
from opd.mask.describe import describe
from opd.mask.discover import discover_mask
from opd.mask.figures import heat_map, overlap_bars
from opd.mask.mask import Mask
from opd.run.mask import score
from opd.run.model_names import find_base, resolved_model
from opd.run.recipe import load_recipe
from opd.run.train import run_one

DISCOVER = """usage: opd mask discover rule=RULE density=SHARE out=MASK [base=MODEL] [key=value ...]

Find a mask by a rule. docs/masks.md explains each rule and its cost.

example: opd mask discover base=MODEL rule=near_zero density=0.1 out=m.safetensors
"""
SHOW = """usage: opd mask show MASK [out=DIR] [--json]

Where a mask is dense: tables; with out= a heat map (density.png), with --json numbers.

example: opd mask show m.safetensors out=figures
"""
COMPARE = """usage: opd mask compare A B [base=MODEL] [out=DIR] [--json]

How two masks of one base overlap, beside chance; with out= bars (overlap.png), with --json numbers.

example: opd mask compare a.safetensors b.safetensors base=MODEL
"""
COMBINE = """usage: opd mask combine union|intersection|difference A B out=MASK [overwrite=true]

Combine two masks of one base; difference is A without B.

example: opd mask combine intersection a.safetensors b.safetensors out=both.safetensors
"""


@dataclass(kw_only=True, slots=True)
class DiscoverArguments(RuleConfig):
    """Keys of `opd mask discover`."""

    base: str | None = None
    """The model whose weights are masked; by default that of the run `trained`, or of `recipe`."""
    out: str = MISSING
    """Mask file to write."""
    overwrite: bool = False
    """Replace an existing file."""
    recipe: str | None = None
    """Rules that score a live run: the recipe to run for `steps` steps; overrides of it may follow."""


@dataclass(kw_only=True, slots=True)
class ShowArguments:
    """Keys of `opd mask show`."""

    out: str | None = None
    """Folder for a heat map, density.png."""


@dataclass(kw_only=True, slots=True)
class CompareArguments:
    """Keys of `opd mask compare`."""

    base: str | None = None
    """Folder or Hub id of the masks' base; adds chance at equal counts per binade of the weights."""
    out: str | None = None
    """Folder for bars, overlap.png."""


@dataclass(kw_only=True, slots=True)
class CombineArguments:
    """Keys of `opd mask combine`."""

    out: str = MISSING
    """Mask file to write."""
    overwrite: bool = False
    """Replace an existing file."""


def discover(argv: list[str]) -> None:
    """``opd mask discover``."""
    line = parse_command_line(argv, DISCOVER, shown=DiscoverArguments)
    settings, overrides = line.settings, []
    if any(word.startswith("recipe=") for word in settings):
        settings, overrides = split_arguments(DiscoverArguments, settings)
    arguments = parse_arguments(DiscoverArguments, settings)
    out = _require_writable(arguments.out, arguments.overwrite)
    model = _base(arguments, overrides)
    rule = RuleConfig(**{f.name: getattr(arguments, f.name) for f in fields(RuleConfig)})
    command = shlex.join(["opd", "mask", "discover", *argv])
    with TemporaryDirectory(prefix="opd-mask-") as folder, progress_bar() as progress:
        if rule.rule in LIVE_RULES and rule.scores is None:
            rule.scores = _live_scores(arguments, rule, overrides, Path(folder))
        elif arguments.recipe is not None:
            raise ValueError(
                f"recipe={arguments.recipe} has no effect with rule={rule.rule}: it is for "
                f"{', '.join(LIVE_RULES)} without scores=FILE"
            )
        require_valid_rule(rule)
        base = open_checkpoint(model)
        like = None if rule.like is None else Mask.read(rule.like)
        summary = discover_mask(base, rule, out, like=like, command=command, progress=progress)
    Console(markup=False).print(discovery_table(summary))
    for warning in summary.warnings:
        print(f"opd: warning: {warning}", file=sys.stderr)


def _base(arguments: DiscoverArguments, overrides: list[str]) -> str:
    if arguments.base is None and arguments.recipe is not None:
        return load_recipe(arguments.recipe, *overrides).config.student.model
    if arguments.base is None and arguments.trained is None:
        raise ValueError("base=... is missing: give the folder or Hub id of the model to mask")
    return find_base(arguments.trained or "", arguments.base)


def _live_scores(
    arguments: DiscoverArguments, rule: RuleConfig, overrides: list[str], folder: Path
) -> str:
    """The file of scores that a short run of the recipe writes."""
    if arguments.recipe is None:
        raise ValueError(
            f"rule={rule.rule} scores a live run: give recipe=RECIPE to run for {rule.steps} steps, "
            "or scores=FILE of such a run"
        )
    recipe = load_recipe(arguments.recipe, *overrides)
    if arguments.base is not None:
        _require_same_model(resolved_model(arguments.base), recipe.config.student.model)
    return str(score(recipe, rule.rule, rule.steps, folder, run_one))


def _require_same_model(base: str, student: str) -> None:
    if open_checkpoint(base).fingerprint() != open_checkpoint(student).fingerprint():
        raise ValueError(
            f"base={base} is not the recipe's student.model={student}, whose weights are scored: use "
            "the same model in both"
        )


def show(argv: list[str]) -> None:
    """``opd mask show``."""
    line = parse_command_line(argv, SHOW, positionals=("MASK",), flags=("--json",))
    arguments = parse_arguments(ShowArguments, line.settings)
    (file,) = line.positionals
    mask = Mask.read(file)
    description = describe(mask)
    if "--json" in line.flags:
        print(json.dumps(description_json(mask, description), indent=1))
    else:
        for table in description_tables(mask, description):
            Console(markup=False).print(table)
    if arguments.out is not None:
        figure = Path(arguments.out) / "density.png"
        heat_map(description, f"{_title(file, mask)} of {mask.origin.model}", figure)
        _print_figure(figure, line.flags)


def compare(argv: list[str]) -> None:
    """``opd mask compare``."""
    line = parse_command_line(
        argv, COMPARE, positionals=("A", "B"), flags=("--json",), shown=CompareArguments
    )
    arguments = parse_arguments(CompareArguments, line.settings)
    a, b = (Mask.read(file) for file in line.positionals)
    with progress_bar() as progress:
        base = None if arguments.base is None else open_checkpoint(resolved_model(arguments.base))
        comparison = compare_masks(a, b, base, progress)
    first, second = line.positionals
    titles = (_title(first, a), _title(second, b))
    if "--json" in line.flags:
        print(json.dumps(comparison_json(comparison), indent=1))
    else:
        for table in comparison_tables(comparison, titles):
            Console(markup=False).print(table)
    if arguments.out is not None:
        figure = Path(arguments.out) / "overlap.png"
        overlap_bars(comparison, titles, figure)
        _print_figure(figure, line.flags)


def combine(argv: list[str]) -> None:
    """``opd mask combine``."""
    line = parse_command_line(argv, COMBINE, positionals=("HOW", "A", "B"), shown=CombineArguments)
    how, first, second = line.positionals
    operations = {
        "union": Mask.union,
        "intersection": Mask.intersection,
        "difference": Mask.difference,
    }
    if how not in operations:
        raise ValueError(f"{how} does not combine masks: allowed are {', '.join(operations)}")
    arguments = parse_arguments(CombineArguments, line.settings)
    out = _require_writable(arguments.out, arguments.overwrite)
    combined = operations[how](Mask.read(first), Mask.read(second))
    command = shlex.join(["opd", "mask", "combine", *argv])
    replace(combined, origin=replace(combined.origin, command=command)).save(out)
    print(f"{out}: {Mask.read(out).density:.4%} of all weights kept")


def _require_writable(out: str, overwrite: bool) -> Path:
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"out={out} is a folder: give a file, as out={path / 'mask.safetensors'}")
    if path.exists() and not overwrite:
        raise ValueError(f"out={out} already exists: give another name, or overwrite=true")
    return path


def _title(file: str, mask: Mask) -> str:
    return f"{Path(file).name} ({mask.origin.rule})"


def _print_figure(figure: Path, flags: set[str]) -> None:
    if "--json" not in flags:
        print(f"figure: {figure}")
