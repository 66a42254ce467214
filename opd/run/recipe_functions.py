"""Finds the files of the user's own functions beside the recipe that names them."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig


def find_functions(settings: Any, folder: Path) -> None:
    """Make ``path.py:name`` absolute where the file lies beside the recipe, not in the working directory.

    ``settings``: a DictConfig or ListConfig.
    """
    keys = settings.keys() if isinstance(settings, DictConfig) else range(len(settings))
    for key in list(keys):
        value = settings[key]
        if isinstance(value, DictConfig | ListConfig):
            find_functions(value, folder)
        elif key in ("function", "path") and isinstance(value, str) and ".py:" in value:
            file, _, name = value.rpartition(":")
            if not Path(file).exists() and (folder / file).is_file():
                settings[key] = f"{folder / file}:{name}"
