"""Rows of tensors as parquet and csv: a column for each figure, named by its path."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from opd.analysis.rows import Row
from opd.plain_text import write_csv

PARQUET, CSV = "tensors.parquet", "tensors.csv"


def flatten(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each row as a flat dictionary; keys are paths joined by slashes."""
    return [dict(_flat(row, "")) for row in rows]


def write_tables(rows: Sequence[Row], out: Path) -> None:
    """``tensors.parquet`` and ``tensors.csv``; lists are JSON text in both."""
    import pyarrow
    from pyarrow import parquet

    flat = flatten(rows)
    columns = list(dict.fromkeys(key for row in flat for key in row))
    table = {column: [row.get(column) for row in flat] for column in columns}
    parquet.write_table(pyarrow.table(table), out / PARQUET)
    write_csv(out / CSV, columns, flat)


def _flat(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    match node:
        case dict():
            for key, value in node.items():
                yield from _flat(value, f"{path}/{key}" if path else str(key))
        case list():
            yield path, json.dumps(node)
        case _:
            yield path, node
