"""What a command and its processes take: peak memory, and CPU time per step."""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 1 << 20
WARM = 5
"""First steps of a run, left out of its CPU time."""


def watched(
    command: Sequence[str],
    log: Path,
    *,
    threads: int,
    steps: Path | None = None,
    warm: int = WARM,
) -> dict[str, float]:
    """Run a command to its end and look at all its processes four times a second.

    largest_mib: peak resident size of the largest process. together_mib: the largest sum of
    proportional set sizes (shared pages counted once). cpu_seconds: of all processes, per line that
    the file ``steps`` gained after its first ``warm`` lines, a line being a step. Exits with the end of
    ``log`` when the command fails.
    """
    fixed = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    largest, together = 0.0, 0.0
    reached: dict[int, float] = {}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=os.environ | fixed, stdout=file, stderr=subprocess.STDOUT
        )
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(0.25):
            seen = [s for p in _tree(process.pid) if (s := _looked_at(p)) is not None]
            largest = max([largest, *(s.peak for s in seen)])
            together = max(together, sum(s.share for s in seen))
            if steps is not None and steps.exists():
                done = steps.read_text().count("\n")
                reached.setdefault(done, sum(s.cpu for s in seen))
    if process.returncode:
        sys.exit(f"{log} ends with:\n" + log.read_text(errors="replace")[-3000:])
    figures = {"largest_mib": largest / MIB, "together_mib": together / MIB}
    later = {done: cpu for done, cpu in reached.items() if done > warm}
    if len(later) > 1:
        first, last = min(later), max(later)
        figures["cpu_seconds"] = (later[last] - later[first]) / (last - first)
    return figures


@dataclass(frozen=True, slots=True)
class Look:
    """A process at one moment: peak resident bytes, proportional share in bytes, CPU seconds so far."""

    peak: float
    share: float
    cpu: float


def _tree(pid: int) -> list[psutil.Process]:
    try:
        own = psutil.Process(pid)
        return [own, *own.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _looked_at(process: psutil.Process) -> Look | None:
    """None of a process that has just ended."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next(x for x in status.splitlines() if x.startswith("VmHWM"))
        times = process.cpu_times()
        return Look(
            peak=float(peak.split()[1]) * 1024,
            share=float(process.memory_full_info().pss),
            cpu=times.user + times.system,
        )
    except (psutil.Error, OSError, StopIteration):
        return None
