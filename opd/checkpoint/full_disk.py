"""The free space of a disk, and a sentence about one that is full."""

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.faults import RunError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
WRITERS = re.compile(
    r"PytorchStreamWriter|inline_container.*unexpected pos|os error (28|122|27)\)", re.DOTALL
)
"""torch's and safetensors' words when the system takes no more bytes; 28, 122, 27 are those of ``FULL``."""


@contextmanager
def full_disk_explained(
    what: str, folder: Path, *, needed: int | None, remedy: str
) -> Iterator[None]:
    """Inside, an error of a full disk becomes a RunError of one sentence.

    ``what`` is written into ``folder``, of about ``needed`` bytes where that is known; ``remedy`` is what
    remains, and what to do.
    """
    try:
        yield
    except Exception as error:  # torch and safetensors have classes of their own
        if isinstance(error, RunError) or not _is_full(error):
            raise
        size = "" if needed is None else f", which needs about {readable(needed)}"
        raise RunError(
            f"the disk is full: {readable(free_bytes(folder))} are free in {folder} for {what}{size}; "
            f"{remedy}"
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    return WRITERS.search(str(error)) is not None


def free_bytes(folder: Path) -> int:
    """What is free on the disk of ``folder``, or of the folder that it will be made in."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def readable(size: int) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
