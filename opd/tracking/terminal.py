"""The results of reports and comparisons as tables for the terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from opd.tracking.compare import compare
from opd.tracking.formatting import number
from opd.tracking.report import cell
from opd.tracking.runs import read_started_run


def summary_table(folder: str | Path) -> Table:
    """Each task of a finished run before and after training, beside the teacher; without tasks, the loss.

    Raises ``ValueError`` when the folder is not a run's or has no steps yet.
    """
    run = read_started_run(folder)
    summary = Table(title=f"{run.name}: {run.status}", title_justify="left", title_style="bold")
    for heading in ("task", "before", "after", "teacher", "gap closed", "KL before", "KL after"):
        summary.add_column(heading, justify="left" if heading == "task" else "right")
    for result in run.results:
        kl = run.series(f"eval/{result.task}/reverse_kl")
        summary.add_row(
            result.task,
            f"{result.before:.3f}",
            Text(f"{result.after:.3f}", style="bold"),
            cell("teacher", result.teacher),
            cell("gap closed", result.gap_closed),
            number(kl.values[0] if kl else None),
            number(kl.last),
        )
    loss = run.series("loss/total")
    if not run.results and loss:
        row = ("training loss", number(loss.values[0]), number(loss.last))
        summary.add_row(*row, *["-"] * 4)
    return summary


def comparison_table(folders: Sequence[str | Path]) -> Table:
    """The runs best first: status, settings that differ, accuracy before and after, KL (or loss).

    Raises ``ValueError`` as ``compare`` does.
    """
    comparison = compare(folders)
    compared = Table(title="Best first", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    compared.add_column("run", overflow="fold")
    if comparison.settings:
        compared.add_column("settings", no_wrap=True)
    for task in comparison.tasks:
        compared.add_column(f"{task}\naccuracy", justify="right", no_wrap=True)
        compared.add_column("reverse\nKL", justify="right", no_wrap=True)
    if not comparison.tasks:
        compared.add_column("loss", justify="right", no_wrap=True)
    compared.add_column("status")
    for entry in comparison.entries:
        cells = [entry.name]
        if comparison.settings:
            cells.append("\n".join(entry.typed))
        for task in comparison.tasks:
            result = entry.run.result(task)
            cells += [
                f"{result.before:.3f} → {result.after:.3f}" if result else "-",
                number(entry.run.series(f"eval/{task}/reverse_kl").last),
            ]
        if not comparison.tasks:
            cells.append(number(entry.run.series("loss/total").last))
        style = "" if entry.run.finished else "red"
        compared.add_row(*cells, Text(entry.run.status, style=style))
    return compared
