"""``opd mask``: discover, show, compare and combine masks."""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from opd.cli.mask_delta import add_delta_commands
from opd.config.arguments import explained, typed
from opd.config.masks import RuleConfig

if TYPE_CHECKING:
    from opd.mask.mask import Mask
    from opd.checkpoint.chunks import Progress


@dataclass(kw_only=True, slots=True)
class DiscoverCommand(RuleConfig):
    """What `opd mask discover` is told."""

    base: str = MISSING
    """Folder or hub id of the model whose weights are masked."""
    out: str = MISSING
    """Mask file to write."""
    overwrite: bool = False
    """Replace a file that is there."""
    recipe: str | None = None
    """Rules that watch a run: the recipe to run for `steps` steps; keys it knows may follow."""


@dataclass(kw_only=True, slots=True)
class CompareCommand:
    """What `opd mask compare A B` is told."""

    base: str | None = None
    """Folder or hub id of the masks' base; with it chance can keep the magnitudes of weights too."""


@dataclass(kw_only=True, slots=True)
class CombineCommand:
    """What `opd mask combine` is told."""

    out: str = MISSING
    """Mask file to write."""
    overwrite: bool = False
    """Replace a file that is there."""


def add_mask_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``opd mask``."""
    mask = commands.add_parser(
        "mask",
        help="which weights may learn: discover, show, compare, combine, export, apply, undo",
    )
    verbs = mask.add_subparsers(required=True, metavar="VERB")
    _discover_command(verbs)
    show = verbs.add_parser("show", help="where a mask is dense")
    show.add_argument("mask", metavar="MASK", help="mask file")
    show.add_argument("--out", metavar="DIR", help="folder for a heat map, density.png")
    show.add_argument("--json", action="store_true", help="print JSON instead of tables")
    show.set_defaults(run=_show)
    compare = verbs.add_parser(
        "compare",
        help="how two masks overlap, beside chance",
        epilog=f"Keys:\n{explained(CompareCommand)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    compare.usage = "opd mask compare A B [base=MODEL] [options]"
    compare.add_argument("a", metavar="A", help="mask file")
    compare.add_argument("b", metavar="B", help="mask file of the same base")
    compare.add_argument("--out", metavar="DIR", help="folder for bars, overlap.png")
    compare.add_argument("--json", action="store_true", help="print JSON instead of tables")
    compare.set_defaults(run=_compare)
    combine = verbs.add_parser(
        "combine",
        help="union, intersection or difference of two masks",
        epilog=f"Keys:\n{explained(CombineCommand)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    combine.usage = "opd mask combine union|intersection|difference A B out=MASK"
    combine.add_argument("how", metavar="HOW", help="union, intersection, or difference (A not B)")
    combine.add_argument("a", metavar="A", help="mask file")
    combine.add_argument("b", metavar="B", help="mask file of the same base")
    combine.set_defaults(run=_combine)
    add_delta_commands(verbs)


def _discover_command(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    discover = verbs.add_parser(
        "discover",
        help="find a mask by a rule",
        description="Find a mask by a rule. docs/masks.md says what each rule is and costs.",
        epilog=f"Keys and their defaults:\n{explained(DiscoverCommand)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    discover.usage = "opd mask discover base=MODEL rule=RULE density=SHARE out=MASK [KEY=VALUE ...]"
    discover.set_defaults(run=_discover)


def _discover(parsed: argparse.Namespace, rest: list[str]) -> None:
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from opd.run.recipe import composed, find_recipe
    from opd.cli.mask_tables import discovered
    from opd.run.mask import watch
    from opd.run.train import run
    from opd.mask.discover import discover_mask
    from opd.mask.settings import WATCHED, require_sound
    from opd.checkpoint.tensors import open_checkpoint

    words, overrides = _split(rest)
    told = typed(DiscoverCommand, words)
    out = _free(told.out, told.overwrite)
    rule = RuleConfig(**{f.name: getattr(told, f.name) for f in fields(RuleConfig)})
    command = shlex.join(["opd", "mask", "discover", *rest])
    with TemporaryDirectory(prefix="opd-mask-") as folder, progress_bar() as progress:
        if rule.rule in WATCHED and rule.scores is None:
            if told.recipe is None:
                raise ValueError(
                    f"rule={rule.rule} watches a run: give recipe=RECIPE to run for {rule.steps} steps, "
                    "or scores=FILE that such a run left"
                )
            recipe = composed(find_recipe(told.recipe), overrides)
            _require_same_model(told.base, recipe.config.student.model)
            rule.scores = str(watch(recipe, rule.rule, rule.steps, Path(folder), run))
        elif told.recipe is not None:
            raise ValueError(
                f"recipe={told.recipe} has no effect with rule={rule.rule}: it is for "
                f"{', '.join(WATCHED)} without scores=FILE"
            )
        require_sound(rule)
        base = open_checkpoint(told.base)
        summary = discover_mask(base, rule, out, command=command, progress=progress)
    Console().print(discovered(summary))
    for warning in summary.warnings:
        print(f"opd: warning: {warning}", file=sys.stderr)


def _require_same_model(base: str, student: str) -> None:
    from opd.checkpoint.tensors import open_checkpoint

    if open_checkpoint(base).fingerprint() != open_checkpoint(student).fingerprint():
        raise ValueError(
            f"base={base} is not the recipe's student.model={student}, whose weights are watched: give "
            "the same model to both"
        )


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Our own words, and with ``recipe=`` the recipe's, which we do not know."""
    _refuse_options(words)
    if not any(word.startswith("recipe=") for word in words):
        return list(words), []
    own = {field.name for field in fields(DiscoverCommand)}
    ours = [word for word in words if word.partition("=")[0] in own]
    return ours, [word for word in words if word not in ours]


def _show(parsed: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from opd.cli.mask_tables import description_json, description_tables
    from opd.mask.describe import describe
    from opd.mask.mask import read_mask

    _refuse(rest, "opd mask show MASK [--out DIR] [--json]")
    mask = read_mask(Path(parsed.mask))
    described = describe(mask)
    if parsed.json:
        print(json.dumps(description_json(mask, described), indent=1))
    else:
        for table in description_tables(mask, described):
            Console().print(table)
    if parsed.out is not None:
        from opd.mask.figures import heat_map

        picture = Path(parsed.out) / "density.png"
        heat_map(described, f"{_called(parsed.mask, mask)} of {mask.origin.model}", picture)
        _say_written(picture, parsed.json)


def _compare(parsed: argparse.Namespace, rest: list[str]) -> None:
    from rich.console import Console

    from opd.cli.mask_tables import comparison_json, comparison_tables
    from opd.mask.compare import compare
    from opd.mask.mask import read_mask
    from opd.checkpoint.tensors import open_checkpoint

    _refuse_options(rest)
    told = typed(CompareCommand, rest)
    a, b = read_mask(Path(parsed.a)), read_mask(Path(parsed.b))
    with progress_bar() as progress:
        base = None if told.base is None else open_checkpoint(told.base)
        comparison = compare(a, b, base, progress)
    names = (_called(parsed.a, a), _called(parsed.b, b))
    if parsed.json:
        print(json.dumps(comparison_json(comparison), indent=1))
    else:
        for table in comparison_tables(comparison, names):
            Console().print(table)
    if parsed.out is not None:
        from opd.mask.figures import overlap_bars

        picture = Path(parsed.out) / "overlap.png"
        overlap_bars(comparison, names, picture)
        _say_written(picture, parsed.json)


def _combine(parsed: argparse.Namespace, rest: list[str]) -> None:
    from dataclasses import replace

    from opd.mask.mask import Mask, read_mask

    _refuse_options(rest)
    ways = {
        "union": Mask.union,
        "intersection": Mask.intersection,
        "difference": Mask.difference,
    }
    if parsed.how not in ways:
        raise ValueError(f"{parsed.how} is no way to combine masks: allowed are {', '.join(ways)}")
    told = typed(CombineCommand, rest)
    out = _free(told.out, told.overwrite)
    a, b = read_mask(Path(parsed.a)), read_mask(Path(parsed.b))
    made = ways[parsed.how](a, b)
    command = shlex.join(["opd", "mask", "combine", parsed.how, parsed.a, parsed.b, *rest])
    replace(made, origin=replace(made.origin, command=command)).save(out)
    print(f"{out}: {read_mask(out).density:.4%} of all weights kept")


def _free(out: str, overwrite: bool) -> Path:
    path = Path(out)
    if path.is_dir():
        raise ValueError(f"out={out} is a folder: name a file, as out={path / 'mask.safetensors'}")
    if path.exists() and not overwrite:
        raise ValueError(f"out={out} exists: give another name, or overwrite=true")
    return path


def _called(file: str, mask: "Mask") -> str:
    return f"{Path(file).name} ({mask.origin.rule})"


def _say_written(picture: Path, quietly: bool) -> None:
    if not quietly:
        print(f"picture: {picture}")


def _refuse_options(words: Sequence[str]) -> None:
    wrong = [word for word in words if word.startswith("-")]
    if wrong:
        raise ValueError(f"unknown option {wrong[0]}: see opd mask --help")


def _refuse(words: Sequence[str], usage: str) -> None:
    if words:
        raise ValueError(f"unknown argument {words[0]}: usage is {usage}")


@contextmanager
def progress_bar() -> "Iterator[Progress]":
    """A bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _doing, _share: None
        return
    with Bars(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(doing: str, share: float) -> None:
            if doing not in tasks:
                tasks[doing] = bars.add_task(doing, total=1.0)
            bars.update(tasks[doing], completed=share)

        yield tell
