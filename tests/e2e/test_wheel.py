"""A wheel alone, in an empty folder, runs the quickstart."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.command import SMALL, environment

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was unpacked, as pip does."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(REPOSITORY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("opd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_brings_every_recipe_and_its_files(installed: Path) -> None:
    ours = {p.relative_to(REPOSITORY / "recipes") for p in (REPOSITORY / "recipes").rglob("*")}
    ours = {p for p in ours if "__pycache__" not in p.parts and p.suffix != ".pyc"}
    there = {p.relative_to(installed / "opd/recipes") for p in installed.rglob("opd/recipes/**/*")}
    assert ours - there == set()
    assert not list(installed.rglob("__pycache__"))


def test_an_installed_wheel_trains_the_quickstart_in_an_empty_folder(
    installed: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "opd.cli.main", "train", "quickstart", *SMALL, "train.steps=3",
        ],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "quickstart" / "report.html").is_file()
    described = (tmp_path / "runs" / "quickstart" / "config.yaml").read_text()
    assert str(installed / "opd" / "recipes" / "quickstart") in described
    assert str(REPOSITORY) + os.sep + "recipes" not in described
