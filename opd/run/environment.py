"""What the environment of every process that a run starts holds."""

import os
import sys
from pathlib import Path

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Without a GPU tensors come from malloc. glibc gives large freed ones back to the system and faults them in
again page by page, which can cost more than the arithmetic; this keeps them."""


def child_environment() -> dict[str, str]:
    """The caller's environment, with freed memory kept where there is no NVIDIA driver; what is set stays."""
    if Path("/dev/nvidiactl").exists():
        return dict(os.environ)
    return KEEP_FREED_MEMORY | os.environ


def restart_keeping_memory() -> None:
    """Begin this command again with freed memory kept: malloc reads its settings at the start only.

    Nothing happens where they are set already, or where there is a GPU.
    """
    environment = child_environment()
    if environment != dict(os.environ):
        os.execve(
            sys.executable, [sys.executable, "-m", "opd.cli.main", *sys.argv[1:]], environment
        )


def core_share(place: int, of: int, threads: int | None) -> dict[str, str]:
    """The CPU cores of one of ``of`` processes, as environment variables."""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[place % len(cores) :: of] or cores[:1]
    return {
        "OMP_NUM_THREADS": str(threads or len(share)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, share)),
        "TOKENIZERS_PARALLELISM": "false",
    }
