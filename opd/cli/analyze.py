"""``opd analyze``: what training changed in the weights, and is it more than rounding?"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING
from rich.console import Console
from rich.table import Table

from opd.cli.grammar import parse_command_line
from opd.cli.progress import progress_bar
from opd.config.arguments import parse_arguments, split_arguments

if TYPE_CHECKING:
    from opd.run.analyze import Analysis

HELP = """usage: opd analyze trained=MODEL out=DIR [base=MODEL] [other=MODEL] [spectrum=fast] [prune=RECIPE]

Compare two checkpoints: sparsity, spectra, placement, each beside its null model.

example: opd analyze trained=runs/quickstart out=analysis
"""


@dataclass(kw_only=True, slots=True)
class AnalyzeArguments:
    """Keys of `opd analyze`."""

    base: str | None = None
    """What training started from: folder, Hub id, run or recipe; by default that of the run `trained`."""
    trained: str = MISSING
    """The trained model: a folder, a Hub id or a run folder (its final/)."""
    out: str = MISSING
    """Folder for tables, pictures and the report; the same command resumes from what is there."""
    other: str | None = None
    """A second model trained from the same base: how the two updates overlap."""
    spectrum: str = "exact"
    """exact, or fast: the 64 leading singular values of each update, with bounds, no decompositions."""
    prune: str | None = None
    """Recipe for evaluations with part of the changes reverted; keys of `opd prune` may follow."""


def main(argv: list[str]) -> None:
    """Parse, run and print."""
    line = parse_command_line(argv, HELP, shown=AnalyzeArguments)
    own, others = split_arguments(AnalyzeArguments, line.settings)
    prunes = any(word.startswith("prune=") for word in own)
    arguments = parse_arguments(AnalyzeArguments, own if prunes else line.settings)
    if arguments.spectrum not in ("exact", "fast"):
        raise ValueError(f"spectrum={arguments.spectrum}: allowed are exact and fast")
    from opd.run.analyze import analyze  # loads torch, which --help does not need

    curve = None if arguments.prune is None else _pruned(arguments, others)
    with progress_bar() as progress:
        found = analyze(
            arguments.base,
            arguments.trained,
            other=arguments.other,
            spectrum=arguments.spectrum,
            out=arguments.out,
            prune=curve,
            progress=progress,
        )
    _print(found)


def _pruned(arguments: AnalyzeArguments, others: list[str]) -> dict[str, Any]:
    from opd.cli.prune import print_curves  # loads torch, which --help does not need
    from opd.run.prune import parse_prune, prune

    keys = [f"trained={arguments.trained}", f"recipe={arguments.prune}"]
    keys += [] if arguments.base is None else [f"base={arguments.base}"]
    result = prune(parse_prune([*keys, f"out={arguments.out}", *others]))
    print_curves(result)
    return result


def _print(found: "Analysis") -> None:
    from opd.analysis.formatting import HEADLINES, format_value, lookup  # with the analysis itself

    table = Table("bf16, as in the paper", box=None)
    for column in ("observed", "null", "excess", "z"):
        table.add_column(column, justify="right")
    for headline in HEADLINES:
        parts = [lookup(found.summary[p], headline.path) for p in ("paper", "null", "excess", "z")]
        if parts[0] is not None:
            cells = [format_value(value, headline.unit) for value in parts[:3]]
            table.add_row(headline.name, *cells, format_value(parts[3], "z"))
    Console(markup=False).print(table)
    print("\n".join(found.sentences))
    for name, reason in found.summary["tensors"]["left_out"].items():
        print(f"opd: left out {name}: {reason}")
    print(f"report: {found.report}")
