"""A folder that appears complete or not at all, and the checksums of its files."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of the name of a folder or file that is being written."""
_THREADS = 8


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the name ``path`` when the block ends without an error.

    Its files are on the disk before it does. A folder of that name is replaced.
    """
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    put_in_place(partial, path)


def partial_path(path: Path) -> Path:
    """The name that ``path`` has while it is written."""
    return path.with_name(path.name + PARTIAL)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a written folder to ``path``, its contents on the disk first."""
    for file in sorted(partial.rglob("*")):
        _flush(file)
    _flush(partial)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    _flush(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file so that readers find the former one or all of this one."""
    partial = partial_path(path)
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder``, by its relative name; several files at a time."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(_checksum, files)
        return {str(p.relative_to(folder)): d for p, d in zip(files, digests, strict=True)}


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
