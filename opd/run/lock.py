"""One command at a time in a run folder."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO

LOCK = ".lock"
_held: set[int] = set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run folder. What is made of it is removed if it stays empty.

    The lock belongs to this process, and to those that inherit ``lock_descriptors``, and ends with the last
    of them, however they end; the file names its owner. Raises ValueError when another process holds it.
    """
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file = _acquire(folder)
    _held.add(file.fileno())
    try:
        yield
    finally:
        _held.discard(file.fileno())
        (folder / LOCK).unlink(missing_ok=True)
        file.close()
        with suppress(OSError):  # not empty
            for each in made:
                each.rmdir()


def lock_descriptors() -> tuple[int, ...]:
    """What a child inherits to hold the locks of this process as well: it may outlive it for a moment."""
    return tuple(_held)


def hold(folder: Path) -> None:
    """Hold the lock of a run folder until this process ends; see ``locked``."""
    folder.mkdir(parents=True, exist_ok=True)
    with _acquire(folder) as file:
        _held.add(os.dup(file.fileno()))


def _acquire(folder: Path) -> IO[str]:
    path = folder / LOCK
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                raise ValueError(_refusal(folder, file)) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its owner removed it in between
    file.truncate(0)
    owner = {"process": os.getpid(), "host": socket.gethostname(), "since": _now()}
    file.write(json.dumps(owner))
    file.flush()
    return file


def _refusal(folder: Path, file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        holder = f"process {owner['process']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        holder = "another process"
    return f"the folder {folder} is in use by {holder}: wait until it ends, or give another run.dir"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
