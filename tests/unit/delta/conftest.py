"""What the tests of sparse checkpoints share: a way to write model folders."""

from pathlib import Path

import pytest

from tests.unit.delta.models import Folder, Weights, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Writes a model folder of these weights under a name."""

    def write(name: str, weights: Weights, **config: object) -> Path:
        return write_folder(tmp_path / name, weights, **config)

    return write
