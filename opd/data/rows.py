"""Rows of a file or of a Hugging Face data set, each with its place for error messages."""

import codecs
import csv
import glob
import gzip
import json
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd.data.arrow_rows import Row, is_saved, read_hub, read_parquet, read_saved

FILE_KINDS = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
MOST_CELL_CHARACTERS = 2**31 - 1


def read_rows(
    source: str,
    *,
    split: str = "train",
    subset: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Iterator[Row]:
    """Yield (place, row) in the order of the source; a place looks like ``train.jsonl:12``.

    ``source`` is a path whose name ends in one of ``FILE_KINDS``, a glob of such paths (in sorted
    order), a folder, or a hub id. ``split`` picks a part of a hub data set or of a folder;
    ``subset`` and ``revision`` are those of a hub data set, and ``streaming`` reads its rows without a
    copy of the whole on disk. A line number counts from 1; a row of a parquet file, a JSON list or
    the hub counts from 1 too. Raises ``ValueError`` for what cannot be read.
    """
    path = Path(source)
    if glob.has_magic(source) and not path.exists():
        yield from _read_glob(source)
    elif _kind(path) is None:
        if path.is_file():
            raise ValueError(
                f"{source}: found a file of an unknown kind; allowed: {', '.join(FILE_KINDS)}; "
                "convert it, or rename it if it is one of these"
            )
        if path.is_dir() and is_saved(path):
            _warn_of_no_effect(source, subset, revision)
            yield from read_saved(source, path, split)
        else:
            yield from read_hub(source, split, subset, revision, streaming)
    else:
        _warn_of_no_effect(source, subset, revision)
        yield from _read_file(source)


def _kind(path: Path) -> str | None:
    return next((kind for kind in FILE_KINDS if path.name.endswith(kind)), None)


def _warn_of_no_effect(source: str, subset: str | None, revision: str | None) -> None:
    for name, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            warnings.warn(f"{name}={value} has no effect on {source}", stacklevel=3)


def _read_glob(pattern: str) -> Iterator[Row]:
    files = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not files:
        raise ValueError(
            f"{pattern}: no file matches (looked in {Path.cwd()}); give a pattern relative to where the "
            "command is run"
        )
    for file in files:
        yield from _read_file(file)


def _read_file(source: str) -> Iterator[Row]:
    """The rows of one file, by the end of its name."""
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"{source}: no such file (looked in {Path.cwd()}); give a path relative to where the "
            "command is run, or a hub id"
        )
    match _kind(path):
        case ".jsonl" | ".jsonl.gz":
            yield from _read_jsonl(source, path)
        case ".json":
            yield from _read_json(source, path)
        case ".csv":
            yield from _read_csv(source, path)
        case ".parquet":
            yield from read_parquet(source, path)
        case _:
            raise ValueError(
                f"{source}: found a file of an unknown kind; allowed: {', '.join(FILE_KINDS)}; "
                "make the pattern narrower, or convert it"
            )


def _text(source: str, path: Path) -> str:
    """The file's text; a byte order mark is not part of it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(_not_utf8(source, line)) from error
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({error}); check the file") from error


def _not_utf8(source: str, line: int) -> str:
    return f"{source}:{line}: found bytes that are not UTF-8; save the file as UTF-8"


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


def _lines(source: str, path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, one line in memory at a time; a byte order mark is left out.

    Lines end at a line feed alone: U+2028, at which ``splitlines`` splits, may stand in a JSON string.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                body = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
                try:
                    yield number, body.decode()
                except UnicodeDecodeError as error:
                    raise ValueError(_not_utf8(source, number)) from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{source}: cannot be read ({error}); check the file") from error


def _read_jsonl(source: str, path: Path) -> Iterator[Row]:
    for number, line in _lines(source, path):
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
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _read_csv_rows(source, csv.DictReader(file, strict=True))
    except UnicodeDecodeError:
        _text(source, path)  # raises with the line
        raise
    except OSError as error:
        raise ValueError(f"{source}: cannot be read ({error}); check the file") from error


def _read_csv_rows(source: str, reader: "csv.DictReader[str]") -> Iterator[Row]:
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
