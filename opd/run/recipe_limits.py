"""What a recipe may not do: run code of its own choice, or read secrets from the environment."""

import os
import re
from collections.abc import Iterator
from typing import Any

HYDRA = ("hydra.", "hydra_plugins.")
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def require_own_targets(node: Any) -> None:
    """ValueError when Hydra's own configuration names a class or function that is not Hydra's.

    Hydra calls each ``_target_`` below ``hydra:`` (callbacks, launcher, sweeper) in a sweep.
    """
    for target in _targets(node):
        if not target.startswith(HYDRA):
            raise ValueError(
                f"the recipe has hydra: with _target_: {target}, which would be called: allowed are "
                "Hydra's own launchers and sweepers; remove it"
            )


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield str(node["_target_"])
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


def read_variable(name: str, *default: Any) -> Any:
    """The resolver ``oc.env`` without secrets: resolved settings are written into run folders and reports.

    ValueError for a variable that is not set and has no default, or whose name is one of a secret.
    """
    if SECRET.search(name):
        raise ValueError(
            f"${{oc.env:{name}}} would write a secret into the run folder: the libraries that need "
            f"{name} read it from the environment themselves; remove it from the recipe"
        )
    if name not in os.environ and not default:
        raise ValueError(f"${{oc.env:{name}}}: the variable is not set; set it, or give a default")
    return os.environ.get(name, *default)
