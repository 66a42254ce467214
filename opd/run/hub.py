"""Whether the Hugging Face Hub can be reached."""

import httpx
from huggingface_hub import constants


def hub_answers() -> bool:
    """Whether the hub answers within a few seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=5)
    except httpx.HTTPError:
        return False
    return True
