"""One folder for the temporary files of a run and of all that it starts; a later start removes it."""

import getpass
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"
"""Name in the run folder: the folder, or a link to it where sockets do not fit into the run folder."""
PREFIX = "opd-run-"
SOCKET_CHARACTERS = 50
"""Longest name of a socket below the folder, with the folder that a server makes for itself."""
ATTEMPTS = 10
COMPILED = "TORCHINDUCTOR_CACHE_DIR"


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Inside, temporary files of this process and its children are made in a folder of the run's.

    What an earlier run left is removed first: one that was killed could not. The caller holds the lock of
    the run folder. torch's compiler keeps its cache where it was.
    """
    remove_temporary(folder)
    before = {name: os.environ.get(name) for name in ("TMPDIR", COMPILED)}
    cache = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    path = _make(folder.resolve() / TEMPORARY)
    os.environ["TMPDIR"] = str(path)
    os.environ.setdefault(COMPILED, str(cache))
    tempfile.tempdir = None  # read the variable again
    try:
        yield path
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        remove_temporary(folder)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary folder of a run, and what a link to one points at."""
    own = folder / TEMPORARY
    if own.is_symlink():
        target = own.readlink()
        if target.name.startswith(PREFIX) and not target.is_symlink():
            _remove(target)
        own.unlink()
    else:
        _remove(own)


def _make(own: Path) -> Path:
    own.mkdir(parents=True)
    if _takes_sockets(own):
        return own
    own.rmdir()
    target = Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(4)}"
    own.symlink_to(target)  # first: what is recorded can be removed
    target.mkdir(mode=0o700)
    return target


def _takes_sockets(folder: Path) -> bool:
    """Whether the path is short enough for a socket, and the file system has them."""
    path = folder / ("s" * SOCKET_CHARACTERS)
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.bind(str(path))
        except OSError:
            return False
        path.unlink()
    return True


def _remove(path: Path) -> None:
    """Processes that are ending may still write into the folder: try again for a while."""
    for _ in range(ATTEMPTS):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(0.1)
