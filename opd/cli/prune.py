"""``opd prune``: revert part of what training changed, and evaluate the rest."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from opd.cli.grammar import parse_command_line
from opd.run.prune import PruneArguments, parse_prune, prune

HELP = """usage: opd prune trained=RUN recipe=RECIPE out=DIR [base=MODEL] [key=value ...]

Revert part of what training changed, and evaluate the rest on the recipe's held-out prompts.
Overrides of the recipe may follow.

example: opd prune trained=runs/quickstart recipe=quickstart out=pruned
"""


def main(argv: list[str]) -> None:
    """Parse, run and print."""
    line = parse_command_line(argv, HELP, shown=PruneArguments)
    print_curves(prune(parse_prune(line.settings)))


def print_curves(result: Mapping[str, Any]) -> None:
    """Print the accuracies as a table with a column for each order."""
    console, orders = Console(markup=False), list(result["curves"])
    table = Table("changes reverted", *(f"{order} first" for order in orders))
    for row in zip(*result["curves"].values(), strict=True):
        cells = [f"{p['accuracy']:.3f}  ({p['low']:.3f} to {p['high']:.3f})" for p in row]
        table.add_row(f"{row[0]['share']:.0%}", *cells)
    console.print(table)
