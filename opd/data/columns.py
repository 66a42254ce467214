"""Columns of a row: read by name or by dotted path, as a uid, a teacher's name or an answer."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

import numpy as np

from opd.types import Answer

Scalar = str | bool | Real | Decimal
"""Values that have one plain text; numpy's numbers are ``Real`` too."""


def find_column(row: Mapping[str, Any], path: str) -> Any:
    """``row[path]``, or the value inside structs that a dotted path leads to (``reward.answer``).

    A column whose own name has dots comes first. KeyError when there is none.
    """
    if path in row:
        return row[path]
    for at, char in enumerate(path):
        inner = row.get(path[:at]) if char == "." else None
        if isinstance(inner, Mapping):
            try:
                return find_column(inner, path[at + 1 :])
            except KeyError:
                continue
    raise KeyError(path)


def column(row: Mapping[str, Any], path: str) -> Any:
    """The value that ``find_column`` finds; None where there is none."""
    try:
        return find_column(row, path)
    except KeyError:
        return None


def column_names(row: Mapping[str, Any]) -> str:
    """The columns of a row, for messages; of a struct also those inside it."""
    names: list[str] = []
    for name, value in row.items():
        inner = [f"{name}.{key}" for key in value] if isinstance(value, Mapping) else []
        names += [repr(n) for n in (inner or [name])]
    return ", ".join(names) or "none"


def plain_text(value: Scalar) -> str:
    """A number as people write it (5.0 is "5", 1e-7 is "0.0000001"), a boolean as JSON writes it."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case Integral():
            return str(int(value))
        case Decimal():
            number = value
        case _:
            number = Decimal(repr(float(value)))
    return format(number, "f").removesuffix(".0") if number.is_finite() else str(value)


def sequence(value: Any) -> list[Any] | None:
    """The items of a list, tuple or numpy array; None for anything else."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def read_uid(place: str, row: Mapping[str, Any], index: int) -> str:
    """The row's ``uid``; its number in the source, ``index``, where that is absent or null."""
    uid = row.get("uid")
    if uid is None:
        return str(index)
    if not isinstance(uid, str | Integral) or isinstance(uid, bool) or not str(uid):
        raise ValueError(f"{place}: found uid {uid!r}; expected a non-empty string or an integer")
    return str(uid)


def read_teacher(place: str, row: Mapping[str, Any], field: str) -> str:
    """The teacher that ``row`` names in ``field``; ValueError when it names none."""
    name = column(row, field)
    if not isinstance(name, str) or not name:
        raise ValueError(
            f"{place}: found {name!r} in field {field!r}; expected the name of a teacher, one of "
            "teacher.members"
        )
    return name


def read_answer(
    place: str, row: Mapping[str, Any], field: str, regex: re.Pattern[str] | None
) -> Answer | None:
    """The answer in ``field``: a list gives a tuple of alternatives, of which each is right.

    ``regex`` extracts each of them. Null, nan, an empty list and blank text are no answer: None.
    """
    value = column(row, field)
    items = sequence(value)
    texts = [_answer(place, one, regex) for one in ([value] if items is None else items)]
    found = tuple(text for text in texts if text is not None and text.strip())
    if not found:
        return None
    return found[0] if items is None else found


def _answer(place: str, value: Any, regex: re.Pattern[str] | None) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, Scalar):
        kind = "a struct" if isinstance(value, Mapping) else f"type {type(value).__name__}"
        raise ValueError(
            f"{place}: found an answer of {kind} ({str(value)[:60]!r}); expected a string, a number, "
            "a boolean or a list of these; name a field inside a struct with a dotted path, for "
            "example data.answer_field=reward_model.ground_truth"
        )
    text = plain_text(value)
    if regex is None:
        return text
    match = regex.search(text)
    if match is None:
        raise ValueError(
            f"{place}: data.answer_regex={regex.pattern!r} finds nothing in {text[-60:]!r}; correct "
            "the expression or the row"
        )
    return (match.group(1) if regex.groups else match.group()).strip()


def compile_regex(answer_regex: str | None) -> re.Pattern[str] | None:
    """data.answer_regex, compiled; ValueError when it is no regular expression."""
    try:
        return None if answer_regex is None else re.compile(answer_regex)
    except re.error as error:
        raise ValueError(
            f"data.answer_regex={answer_regex!r} is not a regular expression ({error})"
        ) from error
