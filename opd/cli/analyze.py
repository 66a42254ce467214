"""``opd analyze``: what training changed in the weights, and is it more than rounding?"""

import argparse
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from opd.analysis.formatting import HEADLINES, Spectrum, at, meaning, shown
from opd.cli.mask_delta import final_model
from opd.cli.mask import progress_bar
from opd.config.arguments import explained, typed

if TYPE_CHECKING:
    from opd.run.prune import Asked


@dataclass(kw_only=True, slots=True)
class AnalyzeCommand:
    """What `opd analyze` is told."""

    base: str = MISSING
    """Folder or hub id of the model that training started from."""
    trained: str = MISSING
    """Folder or hub id of the trained model, or the folder of a run (its final/ is meant)."""
    out: str = MISSING
    """Folder for tables, pictures and the report; the same command goes on with what is there."""
    other: str | None = None
    """A second model trained from the same base: how the two updates overlap."""
    spectrum: Spectrum = Spectrum.exact
    """fast: the 64 leading singular values of each update, with bounds, and no decompositions."""
    prune: str | None = None
    """Recipe whose examination is asked while moves are taken back; keys of `opd prune` may follow."""


def add_analyze_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``opd analyze``."""
    parser = commands.add_parser(
        "analyze",
        help="what training changed in the weights, beside what rounding alone would show",
        description="Compare two checkpoints: sparsity, spectra, placement, each beside its null model.",
        epilog=f"Keys:\n{explained(AnalyzeCommand)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.usage = (
        "opd analyze base=MODEL trained=MODEL out=DIR [other=MODEL] [spectrum=fast] [prune=RECIPE]"
    )
    parser.set_defaults(run=_analyze)


def _analyze(parsed: argparse.Namespace, rest: list[str]) -> None:
    wrong = [word for word in rest if word.startswith("-")]
    if wrong:
        raise ValueError(f"unknown option {wrong[0]}: see opd analyze --help")
    own = {field.name for field in fields(AnalyzeCommand)}
    prunes = any(word.startswith("prune=") for word in rest)
    others = [word for word in rest if prunes and word.partition("=")[0] not in own]
    told = typed(AnalyzeCommand, [word for word in rest if word not in others])
    out = Path(told.out)
    if out.is_file():
        raise ValueError(f"out={out} is a file: name a folder")
    pruning = None if told.prune is None else _asked(told, others)

    from opd.analysis.report import write_report
    from opd.analysis.summary import summary
    from opd.analysis.tables import write_tables
    from opd.analysis.walk import Question, walked

    question = Question(
        base=final_model(told.base),
        trained=final_model(told.trained),
        other=None if told.other is None else final_model(told.other),
        spectrum=told.spectrum,
    )
    with progress_bar() as progress:
        rows = walked(question, out, progress)
    found = summary(rows) | {"prune": None if pruning is None else _pruned(pruning)}
    (out / "summary.json").write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    write_tables(rows, out)
    page = write_report(question, rows, found, out)
    _tell(found, page)


def _asked(told: AnalyzeCommand, others: list[str]) -> "Asked":
    from opd.run.prune import asked

    words = [f"base={told.base}", f"trained={told.trained}", f"recipe={told.prune}"]
    return asked([*words, f"out={told.out}", *others])


def _pruned(call: "Asked") -> dict[str, Any]:
    from opd.run.prune import print_curves, prune

    result = prune(call)
    print_curves(result)
    return result


def _tell(found: dict[str, Any], page: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("bf16, as in the paper", box=None)
    for column in ("observed", "null", "excess", "z"):
        table.add_column(column, justify="right")
    for headline in HEADLINES:
        parts = [at(found[part], headline.path) for part in ("paper", "null", "excess", "z")]
        if parts[0] is not None:
            cells = [shown(value, headline.unit) for value in parts[:3]]
            table.add_row(headline.name, *cells, shown(parts[3], "z"))
    Console().print(table)
    print("\n".join(meaning(found)))
    for name, reason in found["tensors"]["left_out"].items():
        print(f"opd: left out {name}: {reason}")
    print(f"report: {page}")
