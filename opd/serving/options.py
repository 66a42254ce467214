"""A dataclass of options and its command line, each made from the other."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, fields
from enum import EnumType
from typing import Any, TypeVar

T = TypeVar("T")


def parse_options(options: type[T], prog: str, arguments: Sequence[str] | None = None) -> T:
    """The options that a command line names.

    Help comes from the docstring of ``options``: its first line, and "``name``: words." for each field.
    """
    doc = options.__doc__ or ""
    parser = argparse.ArgumentParser(prog=prog, description=doc.splitlines()[0])
    told = dict(re.findall(r"``(\w+)``: (.+)\.", doc))
    for option in fields(options):  # pyright: ignore[reportArgumentType]
        shown = "" if option.default in (MISSING, None) else f" (default: {option.default})"
        parser.add_argument(
            _flag(option.name),
            required=option.default is MISSING,
            default=option.default,
            help=told.get(option.name, "") + shown,
            **_reading(option.type),
        )
    return options(**vars(parser.parse_args(arguments)))


def arguments_of(options: Any) -> list[str]:
    """The command line that ``parse_options`` reads back into ``options``."""
    arguments = []
    for option in fields(options):
        value = getattr(options, option.name)
        if value is True:
            arguments.append(_flag(option.name))
        elif value is False and option.type == bool | None:
            arguments.append(_flag(f"no_{option.name}"))
        elif value is not None and value is not False:
            arguments.append(f"{_flag(option.name)}={value}")
    return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reading(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": "store_true"}
    if kind == bool | None:
        return {"action": argparse.BooleanOptionalAction}
    if isinstance(kind, EnumType):
        return {"type": kind, "choices": list(kind)}
    return {"type": {int | None: int, str | None: str}.get(kind, kind)}
