"""Whether the Hugging Face Hub can be reached, and what of it is on this machine."""

import os
from pathlib import Path

import httpx
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name


def hub_answers() -> bool:
    """Whether the hub answers within a few seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError:
        return False
    return True


def is_cached(name: str) -> bool:
    """Whether something of the model or data set ``name`` is in the caches of this machine."""
    hub = (repo_folder_name(repo_id=name, repo_type=kind) for kind in ("model", "dataset"))
    folders = [Path(constants.HF_HUB_CACHE) / folder for folder in hub]
    prepared = name.replace("/", "___").lower()
    datasets = Path(os.environ.get("HF_DATASETS_CACHE", Path(constants.HF_HOME) / "datasets"))
    return any(folder.is_dir() for folder in [*folders, datasets / prepared])
