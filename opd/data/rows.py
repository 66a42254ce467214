"""Rows of a file or of a Hugging Face data set, each with its place for error messages."""

import csv
import gzip
import io
import json
import sys
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opd.data.narrow_floats import narrow_columns, with_short_floats

Row = tuple[str, Mapping[str, Any]]
FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
MOST_CELL_CHARACTERS = 2**31 - 1


def read_rows(source: str, *, split: str = "train", subset: str | None = None) -> Iterator[Row]:
    """Yield (place, row) in the order of the source; a place looks like ``train.jsonl:12``.

    ``source`` is a path whose name ends in one of ``FILE_KINDS``, a folder, or a hub id; ``split``
    and ``subset`` pick a part of a hub data set. A line number counts from 1; a row of a parquet
    file, a JSON list or the hub counts from 1 too. Raises ``ValueError`` for what cannot be read.
    """
    path = Path(source)
    kind = next((kind for kind in FILE_KINDS if path.name.endswith(kind)), None)
    if kind is None:
        if path.is_file():
            raise ValueError(
                f"{source}: found a file of an unknown kind; allowed: {', '.join(FILE_KINDS)}; "
                "convert it, or rename it if it is one of these"
            )
        yield from _read_hub(source, split, subset)
        return
    if not path.is_file():
        raise ValueError(
            f"{source}: no such file (looked in {Path.cwd()}); give a path relative to where the "
            "command is run, or a hub id"
        )
    if subset is not None:
        warnings.warn(f"subset={subset} has no effect on the file {source}", stacklevel=2)
    match kind:
        case ".jsonl" | ".jsonl.gz":
            yield from _read_jsonl(source, path)
        case ".json":
            yield from _read_json(source, path)
        case ".csv":
            yield from _read_csv(source, path)
        case ".parquet":
            yield from _read_parquet(source, path)


def _text(source: str, path: Path) -> str:
    """The file's text; a byte order mark is not part of it."""
    try:
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{source}:{line}: found bytes that are not UTF-8; save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: cannot be read ({error}); check the file") from error


def _object(place: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f"{place}: found a JSON {_json_kind(value)}; expected an object "
            'such as {"prompt": "...", "answer": "..."}'
        )
    return place, value


def _json_kind(value: Any) -> str:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list"}
    return names.get(type(value), "null")


def _unreadable(place: str, error: RecursionError | ValueError) -> str:
    """The message for JSON that is well-formed and cannot be held; ``error`` is what the parser raised."""
    if isinstance(error, RecursionError):
        return f"{place}: found JSON nested too deep to read; flatten it or remove the row"
    return (
        f"{place}: found an integer of more than {sys.get_int_max_str_digits()} digits; write it as a "
        "string or remove the row"
    )


def _read_jsonl(source: str, path: Path) -> Iterator[Row]:
    # Not splitlines(): it also splits at U+2028, which JSON allows inside a string.
    for number, line in enumerate(_text(source, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{source}:{number}: malformed JSON at column {error.colno} ({error.msg}), found "
                f"{line.strip()[:60]!r}; expected one JSON object a line"
            ) from error
        except (RecursionError, ValueError) as error:
            raise ValueError(_unreadable(f"{source}:{number}", error)) from None
        yield _object(f"{source}:{number}", value)


def _read_json(source: str, path: Path) -> Iterator[Row]:
    try:
        values = json.loads(_text(source, path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{source}:{error.lineno}: malformed JSON at column {error.colno} ({error.msg}); "
            "expected one list of objects (one object a line is a .jsonl file)"
        ) from error
    except (RecursionError, ValueError) as error:
        raise ValueError(_unreadable(source, error)) from None
    if not isinstance(values, list):
        raise ValueError(
            f"{source}: found a JSON {'object' if isinstance(values, dict) else 'value'} at the "
            "top; expected a list of objects; for one object a line name the file .jsonl"
        )
    for number, value in enumerate(values, start=1):
        yield _object(f"{source}: row {number}", value)


def _read_csv(source: str, path: Path) -> Iterator[Row]:
    csv.field_size_limit(MOST_CELL_CHARACTERS)  # Python's own limit is 131,072
    reader = csv.DictReader(io.StringIO(_text(source, path), newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise ValueError(
                f"{source}:1: found the column {twice[0]!r} twice; give each column its own name"
            )
        for row in reader:
            place = f"{source}:{reader.line_num}"
            # DictReader files surplus cells under None and fills missing ones with None.
            if None in row or None in row.values():
                expected = len(reader.fieldnames or ())
                raise ValueError(
                    f"{place}: found a row with {'more' if None in row else 'fewer'} cells than "
                    f"the header's {expected}; quote a cell that holds a comma or a line break"
                )
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{source}:{reader.line_num}: malformed CSV ({error})") from error


def _read_parquet(source: str, path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        numbered = enumerate(
            (row for batch in table.iter_batches() for row in batch.to_pylist()), start=1
        )
        narrow = narrow_columns(table.schema_arrow)
        for number, row in numbered:
            yield f"{source}: row {number}", with_short_floats(row, narrow)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source}: not a readable parquet file ({error})") from error


def _read_hub(source: str, split: str, subset: str | None) -> Iterator[Row]:
    import datasets

    # load_dataset raises many classes of errors, and all of them are for the user to act on.
    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    except Exception as error:
        raise ValueError(
            f"{source}: cannot load split {split!r}{f' of subset {subset!r}' if subset else ''} "
            f"({type(error).__name__}: {error}); give a hub id with its subset and split, or a "
            f"file ({', '.join(FILE_KINDS)})"
        ) from error
    narrow = narrow_columns(dataset.features.arrow_schema)
    for number, row in enumerate(dataset, start=1):
        assert isinstance(row, dict)
        yield f"{source}[{split}]: row {number}", with_short_floats(row, narrow)
