"""The small run that the tests of faults disturb, and what an undisturbed one leaves."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from tests.support.command import OPD, environment
from tests.support.disturbed import COMMAND


@pytest.fixture(scope="session")
def home() -> Iterator[Path]:
    """A folder with a short path, so that temporary files fit into run folders."""
    folder = Path(tempfile.mkdtemp(prefix="k"))
    yield folder
    rmtree(folder)


@pytest.fixture(scope="session")
def whole(home: Path) -> Path:
    """The folder of an undisturbed run."""
    done = subprocess.run(
        [*OPD, *COMMAND, "run.dir=whole"],
        cwd=home,
        env=environment() | {"OMP_NUM_THREADS": "1", "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return home / "whole"
