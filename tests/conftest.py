"""What every test shares: two quiet threads, and a way to start ranks."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

REPOSITORY = Path(__file__).parent.parent
RANKS_S = 1500
"""A slow machine needs minutes for many cases; a hang ends here."""
RunRanks = Callable[[int, Sequence[str]], None]


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The folder of the tiny pair that comes with the repository."""
    return REPOSITORY / "recipes" / "quickstart"


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Run a Python script in n processes that find each other, as a launcher does."""

    def run(processes: int, arguments: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with ExitStack() as open_files:
            # files, not pipes: a full pipe would stop a rank that others wait for
            outputs = [open_files.enter_context(TemporaryFile("w+")) for _ in range(processes)]
            started = [
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=os.environ
                    | {
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                        "WORLD_SIZE": str(processes),
                        "LOCAL_WORLD_SIZE": str(processes),
                        "MASTER_ADDR": "127.0.0.1",
                        "MASTER_PORT": str(port),
                    },
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for rank, output in enumerate(outputs)
            ]
            deadline = time.monotonic() + RANKS_S
            statuses: list[int | None] = [None]
            while None in statuses and not any(statuses) and time.monotonic() < deadline:
                time.sleep(0.1)
                statuses = [process.poll() for process in started]
            for process in started:
                process.kill()
                process.wait()
            for status, output in zip(statuses, outputs, strict=True):
                if status != 0 and (status is not None or not any(statuses)):
                    output.seek(0)
                    pytest.fail(
                        f"a rank of {arguments[0]} ended with {status}:\n{output.read()[-3000:]}"
                    )

    return run
