"""Seconds of wall clock, and a trace of what every process of a run did when.

Where the environment names a folder, each process writes its spans into a file there, an event a line, in
Chrome's trace format (chrome://tracing, ui.perfetto.dev). ``write_trace`` puts them together.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

TRACE_FOLDER = "OPD_TRACE_FOLDER"
"""Environment variable: the folder that spans are written to; nothing is traced where it is not set."""


@contextmanager
def timed(times: dict[str, float], name: str) -> Iterator[None]:
    """Seconds of wall clock spent inside, under ``name``, which is a span of the trace too."""
    start = time.perf_counter()
    with span(name.removeprefix("time/")):
        yield
    times[name] = time.perf_counter() - start


@contextmanager
def span(name: str, **figures: float) -> Iterator[None]:
    """A span of this thread in the trace; ``figures`` are shown with it. Nothing without a trace."""
    file = _file(os.getpid())
    if file is None:
        yield
        return
    start = time.time_ns()
    try:
        yield
    finally:
        micros = {"ts": start / 1000, "dur": (time.time_ns() - start) / 1000}
        _write(file, {"name": name, "ph": "X", **micros, "args": figures})


def name_process(name: str) -> None:
    """What the trace calls this process, such as ``rank 0``."""
    file = _file(os.getpid())
    if file is not None:
        _write(file, {"name": "process_name", "ph": "M", "args": {"name": name}})


def write_trace(folder: Path, out: Path) -> None:
    """Put the events of all processes in ``folder`` into ``out``; incomplete last lines are left out."""
    events = []
    for file in sorted(folder.glob("*.jsonl")):
        lines = file.read_text().split("\n")[:-1]
        events += [json.loads(line) for line in lines]
    first = min((event["ts"] for event in events if "ts" in event), default=0.0)
    for event in events:
        if "ts" in event:
            event["ts"] -= first
    out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


@cache
def _file(process: int) -> TextIO | None:
    folder = os.environ.get(TRACE_FOLDER)
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return (Path(folder) / f"{process}.jsonl").open("a", buffering=1)  # a process may be killed


def _write(file: TextIO, event: dict[str, Any]) -> None:
    place = {"pid": os.getpid(), "tid": threading.get_native_id()}
    file.write(json.dumps(event | place) + "\n")
