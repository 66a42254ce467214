"""``key=value`` words as a typed dataclass, and a dataclass explained to the person who types."""

import ast
import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import MISSING as UNSET
from dataclasses import Field, fields
from enum import Enum
from typing import Any, TypeVar, get_args

from omegaconf import MISSING

T = TypeVar("T")


def typed(kind: type[T], words: Sequence[str]) -> T:
    """The dataclass that ``key=value`` words describe.

    ValueError with one sentence for a word without ``=``, an unknown key, a key given twice, a value
    of another type or out of bounds, and a required key that is missing.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from opd.config.fields import broken_bounds

    known = {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    settings = OmegaConf.structured(kind)
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word} is no key=value; keys are {', '.join(known)}")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{key} is not a key here: {meant}keys are {', '.join(known)}")
        if key in given:
            raise ValueError(f"{key}= is given twice, as {given[key]} and as {value}: choose one")
        given[key] = value
        is_text = known[key].type in (str, str | None) and value != "null"
        try:
            # a file may be called no, which YAML takes for false
            told = {key: value} if is_text else OmegaConf.from_dotlist([word])
            settings = OmegaConf.merge(settings, told)
        except (OmegaConfBaseException, yaml.YAMLError):
            raise ValueError(f"{key}={value}: expected {expected(known[key])}") from None
    made = OmegaConf.to_container(settings, throw_on_missing=False)
    assert isinstance(made, dict)
    missing = [name for name in known if made[name] == MISSING]
    if missing:
        raise ValueError(
            f"{missing[0]}=... is missing: {sentence(kind, missing[0])} Keys are {', '.join(known)}"
        )
    result: Any = OmegaConf.to_object(settings)
    broken = list(broken_bounds(result))
    if broken:
        raise ValueError("; ".join(broken))
    return result


def expected(field: Field[Any]) -> str:
    """What a value of a field may be, in words."""
    kind = next((k for k in get_args(field.type) if k is not type(None)), field.type)
    if kind is str and get_args(field.type) and not _is_optional(field):
        return """a list such as '["*norm*","lm_head.weight"]', in quotes against the shell"""
    nothing = " or null" if _is_optional(field) else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(str(choice.value) for choice in kind)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    bounds = allowed(field)
    return f"{words[kind]}{f' {bounds}' if bounds else ''}{nothing}"


def _is_optional(field: Field[Any]) -> bool:
    return type(None) in get_args(field.type)


def explained(kind: type) -> str:
    """Every key with its default, what is allowed and its sentence: the text behind --help."""
    lines: list[str] = []
    for field in fields(kind):
        limits = allowed(field)
        lines.append(f"  {field.name}={default(field)}{f'   ({limits})' if limits else ''}")
        lines.append(f"      {sentence(kind, field.name)}")
    return "\n".join(lines)


def sentence(kind: type, name: str) -> str:
    """The string under a field, the class's own or the nearest ancestor's."""
    for ancestor in kind.__mro__[:-1]:
        told = _sentences(ancestor)
        if name in told:
            return told[name]
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
    """The default as one types it."""
    value = field.default if field.default is not UNSET else None
    if field.default is UNSET and field.default_factory is not UNSET:
        value = field.default_factory()
    if isinstance(value, Enum):
        return str(value.value)
    if value == MISSING:
        return "*required*"
    return value if isinstance(value, str) else json.dumps(value)


def allowed(field: Field[Any]) -> str:
    """Choices of an enumeration, or bounds."""
    if isinstance(field.type, type) and issubclass(field.type, Enum):
        return ", ".join(str(choice.value) for choice in field.type)
    signs = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
    return ", ".join(f"{signs[name]} {bound:g}" for name, bound in field.metadata.items())
