"""What every test shares: quiet libraries on few threads, and the models of the repository."""

import atexit
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

REPOSITORY = Path(__file__).parent.parent
STATUS = pytest.StashKey[int]()


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The folder of the tiny pair that comes with the repository."""
    return REPOSITORY / "recipes" / "quickstart"


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keep the status for ``pytest_unconfigure``."""
    session.config.stash[STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Leave at once with the tests' status: after gloo an interpreter may abort at its exit."""
    if STATUS in config.stash:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash[STATUS])
