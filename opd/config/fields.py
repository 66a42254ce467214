"""Bounds of settings, checks of the bounds, and texts about settings for help and errors."""

import ast
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import MISSING as UNSET
from dataclasses import Field, field, fields, is_dataclass
from enum import Enum
from typing import Any, get_args

from omegaconf import MISSING


def bounded(
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    word: str | None = None,
) -> Any:
    """A field with bounds: ``least`` <= value <= ``most``, ``above`` < value < ``below``, or a ``word``."""
    bounds = {"least": least, "above": above, "most": most, "below": below, "word": word}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def broken_bounds(node: Any, path: str = "") -> Iterator[str]:
    """A sentence for each field, also of nested dataclasses, that is not set or out of bounds."""
    for f in fields(node):
        value, name = getattr(node, f.name), f"{path}{f.name}"
        if value == MISSING:
            yield f"{name} is not set: give it in the recipe or as {name}=..."
        elif is_dataclass(value):
            yield from broken_bounds(value, f"{name}.")
        elif isinstance(value, str) and value != f.metadata.get("word", value):
            yield f"{name}={value}: allowed is {expected(f)}"
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from _broken_bound(name, value, f.metadata)


def require_bounds(node: Any, path: str = "") -> None:
    """ValueError when a dataclass has a field that is not set or out of bounds."""
    broken = list(broken_bounds(node, path))
    if broken:
        raise ValueError("; ".join(broken))


def _broken_bound(name: str, value: float, bounds: Any) -> Iterator[str]:
    if math.isnan(value):
        yield f"{name}={value}: allowed are numbers"
        return
    if "least" in bounds and not value >= bounds["least"]:
        yield f"{name}={value}: allowed is {bounds['least']} or more"
    if "above" in bounds and not value > bounds["above"]:
        yield f"{name}={value}: allowed is more than {bounds['above']}"
    if "below" in bounds and not value < bounds["below"]:
        yield f"{name}={value}: allowed is less than {bounds['below']}"
    if "most" in bounds and not value <= bounds["most"]:
        yield f"{name}={value}: allowed is {bounds['most']} or less"


def expected(field: Field[Any]) -> str:
    """The values that a field may have, as text."""
    kind = next((k for k in get_args(field.type) if k is not type(None)), field.type)
    if kind is str and get_args(field.type) and not _is_optional(field):
        return """a list such as '["*norm*","lm_head.weight"]', in quotes against the shell"""
    nothing = " or null" if _is_optional(field) else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(choice.value) for choice in kind)}"
    types = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    bounds = _bounds(field)
    word = f"{field.metadata['word']} or " if "word" in field.metadata else ""
    return f"{word}{types.get(kind, 'a value')}{f' {bounds}' if bounds else ''}{nothing}"


def _is_optional(field: Field[Any]) -> bool:
    return type(None) in get_args(field.type)


def sentence(kind: type, name: str) -> str:
    """The string under a field, in the class or its nearest ancestor with one."""
    for ancestor in kind.__mro__[:-1]:
        found = _sentences(ancestor)
        if name in found:
            return found[name]
    return ""


def _sentences(kind: type) -> dict[str, str]:
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        node.target.id: str(under.value.value)
        for node, under in zip(body.body, body.body[1:], strict=False)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(under, ast.Expr)
        and isinstance(under.value, ast.Constant)
    }


def default(field: Field[Any]) -> str:
    """The default as it is typed on a command line."""
    value = field.default if field.default is not UNSET else None
    if field.default is UNSET and field.default_factory is not UNSET:
        value = field.default_factory()
    if isinstance(value, Enum):
        return str(value.value)
    if value == MISSING:
        return "*required*"
    return value if isinstance(value, str) else json.dumps(value)


def allowed(field: Field[Any]) -> str:
    """The choices of an enumeration, or the bounds."""
    if isinstance(field.type, type) and issubclass(field.type, Enum):
        return ", ".join(str(choice.value) for choice in field.type)
    word = [field.metadata["word"]] if "word" in field.metadata else []
    return ", ".join([*word, *filter(None, [_bounds(field)])])


def _bounds(field: Field[Any]) -> str:
    signs = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
    given = field.metadata
    return ", ".join(f"{sign} {given[name]:g}" for name, sign in signs.items() if name in given)
