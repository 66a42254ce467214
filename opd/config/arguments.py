"""``key=value`` arguments of a command line as a typed dataclass, and back."""

import difflib
from collections.abc import Sequence
from dataclasses import MISSING as NO_FACTORY
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.config.fields import expected, require_bounds, sentence

T = TypeVar("T")


def parse_arguments(kind: type[T], arguments: Sequence[str]) -> T:
    """The dataclass that ``key=value`` arguments describe.

    ValueError with one sentence for an argument without ``=``, an unknown key, a key given twice, a value
    of another type or out of bounds, and a required key that is missing.
    """
    known = {field.name: field for field in fields(kind)}  # pyright: ignore[reportArgumentType]
    settings = OmegaConf.structured(kind)
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(
                f"{argument} is not of the form key=value; keys are {', '.join(known)}"
            )
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
            parsed = {key: value} if is_text else OmegaConf.from_dotlist([argument])
            settings = OmegaConf.merge(settings, parsed)
        except (OmegaConfBaseException, yaml.YAMLError):
            raise ValueError(f"{key}={value}: expected {expected(known[key])}") from None
    values = OmegaConf.to_container(settings, throw_on_missing=False)
    assert isinstance(values, dict)
    missing = [name for name in known if values[name] == MISSING]
    if missing:
        raise ValueError(
            f"{missing[0]}=... is missing: {sentence(kind, missing[0])} Keys are {', '.join(known)}"
        )
    result: Any = OmegaConf.to_object(settings)
    require_bounds(result)
    return result


def split_arguments(kind: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments that are keys of ``kind``, and the others (overrides of a recipe)."""
    own = {field.name for field in fields(kind)}
    ours = [argument for argument in arguments if argument.partition("=")[0] in own]
    return ours, [argument for argument in arguments if argument not in ours]


def as_arguments(settings: Any) -> list[str]:
    """The arguments that ``parse_arguments`` reads back into ``settings``, without defaults."""
    arguments = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        factory = field.default_factory
        default = field.default if factory is NO_FACTORY else factory()
        if value is None or value == default:
            continue
        if isinstance(value, Enum):
            value = value.value
        arguments.append(f"{field.name}={str(value).lower() if isinstance(value, bool) else value}")
    return arguments
