"""What every test shares: quiet libraries on few threads, and the models of the repository."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def quickstart() -> Path:
    """The folder of the tiny pair that comes with the repository."""
    return REPOSITORY / "recipes" / "quickstart"
