"""The temporary folder of a run: inside it where sockets fit, and gone afterwards, a link's target too."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from opd.run.temporary import PREFIX, TEMPORARY, remove_temporary, temporary_folder


@pytest.fixture
def short() -> Path:
    return Path(tempfile.mkdtemp(prefix="t"))


def test_a_short_run_folder_holds_its_temporary_files(short: Path) -> None:
    before = tempfile.gettempdir()
    with temporary_folder(short) as path:
        assert path == short.resolve() / TEMPORARY
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(path)
        assert not os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(path))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(tempfile.mkdtemp() + "/" + "u" * 36)
    assert list(short.iterdir()) == []
    assert tempfile.gettempdir() == before
    short.rmdir()


def test_a_long_run_folder_names_a_short_one(tmp_path: Path, short: Path) -> None:
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    os.environ["TMPDIR"], former = str(short), os.environ.get("TMPDIR")
    tempfile.tempdir = None
    try:
        with temporary_folder(folder) as path:
            assert path.parent == short
            assert path.name.startswith(PREFIX)
            assert (folder / TEMPORARY).readlink() == path
            (path / "vllm_dist_1").touch()
        assert list(short.iterdir()) == list(folder.iterdir()) == []
        (short / f"{PREFIX}ab").mkdir()
        (folder / TEMPORARY).symlink_to(short / f"{PREFIX}ab")  # as a killed run leaves it
        with temporary_folder(folder):
            assert not (short / f"{PREFIX}ab").exists()
    finally:
        os.environ.pop("TMPDIR")
        if former is not None:
            os.environ["TMPDIR"] = former
        tempfile.tempdir = None
    short.rmdir()


def test_a_link_to_something_else_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "thesis"
    other.mkdir()
    (tmp_path / TEMPORARY).symlink_to(other)
    remove_temporary(tmp_path)
    assert other.is_dir()
    assert not (tmp_path / TEMPORARY).is_symlink()
