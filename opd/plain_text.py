"""Texts from outside, such as names of tensors and runs, that tables and figures show as they are."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""Beginnings of a text that a spreadsheet takes for a formula."""


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a header and rows; what is missing or None is an empty cell.

    A text that a spreadsheet would compute (names of runs and of tensors come from outside) begins with an
    apostrophe, as OWASP recommends against CSV injection; numbers stay as they are.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([_cell(column) for column in columns])
        writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)


def figure_text(text: str) -> str:
    """A text for matplotlib, which would take what stands between two dollars for a formula."""
    return text.replace("$", r"\$")


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
