"""Lines for the stages of a command that take a while: what starts, and how long it took."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Print ``what`` when the block starts, and again with its seconds when it has ended without an error.

    The lines go to standard error at once, also into a pipe.
    """
    print(f"opd: {what} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"opd: {what}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
