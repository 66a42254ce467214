"""What every test shares: two quiet threads, and a way to start ranks."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

REPOSITORY = Path(__file__).parent.parent
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
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        for process in started:
            output, _ = process.communicate(timeout=540)
            if process.returncode != 0:
                for other in started:
                    other.kill()
                pytest.fail(f"a rank of {arguments[0]} failed:\n{output[-3000:]}")

    return run
