"""A setting with bounds, and whether it keeps them."""

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING


def knob(
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with bounds: ``least`` <= value <= ``most``, ``above`` < value < ``below``."""
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def broken_bounds(node: Any, path: str = "") -> Iterator[str]:
    """A sentence for each field of a dataclass, and of those in it, that is not set or out of bounds."""
    for f in fields(node):
        value, name = getattr(node, f.name), f"{path}{f.name}"
        if value == MISSING:
            yield f"{name} is not set: give it in the recipe or as {name}=..."
        elif is_dataclass(value):
            yield from broken_bounds(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from _broken_bound(name, value, f.metadata)


def _broken_bound(name: str, value: float, bounds: Any) -> Iterator[str]:
    if "least" in bounds and not value >= bounds["least"]:
        yield f"{name}={value}: allowed is {bounds['least']} or more"
    if "above" in bounds and not value > bounds["above"]:
        yield f"{name}={value}: allowed is more than {bounds['above']}"
    if "below" in bounds and not value < bounds["below"]:
        yield f"{name}={value}: allowed is less than {bounds['below']}"
    if "most" in bounds and not value <= bounds["most"]:
        yield f"{name}={value}: allowed is {bounds['most']} or less"
