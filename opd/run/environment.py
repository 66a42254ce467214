"""Environment variables of the processes of a run."""

import os
import sys
from pathlib import Path

from opd.config.schema import Config
from opd.timing import TRACE_FOLDER
from opd.vllm_start import CHILDREN

TRACE_PARTS = "trace"
"""The folder of a run in which every process writes its spans."""
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Without a GPU, tensors are allocated by malloc. glibc returns large freed blocks to the system and
page-faults them in again, which can cost more than the arithmetic; these settings keep the blocks."""


def child_environment() -> dict[str, str]:
    """The caller's environment with vLLM's ``CHILDREN``, and KEEP_FREED_MEMORY where there is no GPU.

    Values that are set stay.
    """
    if Path("/dev/nvidiactl").exists():
        return CHILDREN | os.environ
    return CHILDREN | KEEP_FREED_MEMORY | os.environ


def trace_processes(config: Config, run_folder: Path) -> None:
    """Have this process and those that it starts from now on write their spans, with profile=true."""
    os.environ.pop(TRACE_FOLDER, None)
    if config.profile:
        os.environ[TRACE_FOLDER] = str((run_folder / TRACE_PARTS).resolve())


def restart_keeping_memory() -> None:
    """Restart this command with ``child_environment``, since malloc reads its settings only at the start.

    Does nothing where the variables are set already.
    """
    environment = child_environment()
    if environment != dict(os.environ):
        os.execve(
            sys.executable, [sys.executable, "-m", "opd.cli.main", *sys.argv[1:]], environment
        )


def core_share(place: int, of: int, threads: int | None) -> dict[str, str]:
    """Environment variables that give process ``place`` of ``of`` its share of the CPU cores."""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[place % len(cores) :: of] or cores[:1]
    return {
        "OMP_NUM_THREADS": str(threads or len(share)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, share)),
        "TOKENIZERS_PARALLELISM": "false",
    }
