"""Seconds of wall clock."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of wall clock spent inside, under ``name``."""
    start = time.perf_counter()
    yield
    times[name] = time.perf_counter() - start
