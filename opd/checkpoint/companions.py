"""The files beside the weights in a model folder: configuration, tokenizer, chat template, code."""

import json
import shutil
from pathlib import Path

from opd.checkpoint.files import COMPANIONS, model_config
from opd.checkpoint.quantised import QUANTISATION


def require_free(out: Path) -> None:
    """ValueError when ``out`` exists and is not an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out={out} already exists: name a new folder, or remove it")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy configuration, tokenizer and the like; no weights and no index of shards.

    The weights beside the copies are plain, so settings of a quantised source are left out.
    """
    for pattern in COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
    config = model_config(source)
    if any(config.pop(key, None) for key in QUANTISATION):
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
