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

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_SCALARS = re.compile(r"(?:[\s,]|\b(?:None|null|nan|True|False|true|false)\b|[-+.\d])*")


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


def unboxed(value: Any) -> Any:
    """The value of a numpy array without dimensions, and numpy's booleans as Python's."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    return bool(value) if isinstance(value, np.bool_) else value


def is_missing(value: Any) -> bool:
    """Whether a value is null: None, nan or infinite, of any numeric type."""
    match value:
        case None:
            return True
        case Decimal():
            return not value.is_finite()
        case Integral():
            return False
        case Real():
            return not math.isfinite(value)
    return False


def plain_text(value: Scalar) -> str:
    """A number as people write it, a boolean as JSON writes it.

    5.0 and the decimal 5.00 are "5", 1e-7 is "0.0000001", float32's 0.1 is "0.1", -0.0 is "0".
    """
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case Integral():
            return str(int(value))
        case Decimal():
            number = value
        case np.floating():
            number = Decimal(str(value))  # the shortest text of its own type
        case _:
            number = Decimal(repr(float(value)))
    if not number.is_finite():
        return str(value)
    text = format(number, "f")
    text = text.rstrip("0").removesuffix(".") if "." in text else text
    return "0" if number == 0 else text


def require_unicode(place: str, kind: str, text: str) -> None:
    """ValueError when ``text``, called ``kind``, has half of a surrogate pair: no encoding has it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - 20) : error.end + 20]
        raise ValueError(
            f"{place}: found half of a surrogate pair, {text[error.start]!a}, in the {kind} near "
            f"{around!a}; a character of it was cut: restore or remove it"
        ) from None


def sequence(value: Any) -> list[Any] | None:
    """The items of a list, tuple or numpy array; None for anything else."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        return None
    return list(value) if isinstance(value, list | tuple | np.ndarray) else None


def read_uid(place: str, row: Mapping[str, Any], index: int) -> str:
    """The row's ``uid``; its number in the source, ``index``, where that is absent or null."""
    uid = unboxed(row.get("uid"))
    if uid is None:
        return str(index)
    if not isinstance(uid, str | Integral) or isinstance(uid, bool) or not str(uid):
        raise ValueError(f"{place}: found uid {uid!r}; expected a non-empty string or an integer")
    require_unicode(place, "uid", str(uid))
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

    ``regex`` extracts each of them. Null, nan, infinity, an empty list and blank text are no answer:
    None. ValueError for a list that was written as text.
    """
    value = column(row, field)
    items = sequence(value)
    texts = [_answer(place, one, regex) for one in ([value] if items is None else items)]
    found = tuple(text for text in texts if text is not None and text.strip())
    if not found:
        return None
    if items is not None:
        return found
    if _is_list_as_text(found[0]):
        raise ValueError(
            f"{place}: found a list of answers written as text, {found[0][:60]!r}; save the rows as "
            ".jsonl or .parquet with a list in this column, or make the list with data.function (a "
            "list of one, if this text itself is the answer)"
        )
    return found[0]


def _is_list_as_text(text: str) -> bool:
    """Whether ``text`` is a printed list with quoted strings in it: ['a', 'b'], of numpy ['a' 'b']."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return False
    unquoted, quoted = _QUOTED.subn(" ", text[1:-1])
    return quoted > 0 and _SCALARS.fullmatch(unquoted) is not None


def _answer(place: str, value: Any, regex: re.Pattern[str] | None) -> str | None:
    value = unboxed(value)
    if is_missing(value):
        return None
    if not isinstance(value, Scalar):
        kind = "a struct" if isinstance(value, Mapping) else f"type {type(value).__name__}"
        raise ValueError(
            f"{place}: found an answer of {kind} ({str(value)[:60]!r}); expected a string, a number, "
            "a boolean or a list of these; name a field inside a struct with a dotted path, for "
            "example data.answer_field=reward_model.ground_truth"
        )
    text = plain_text(value)
    require_unicode(place, "answer", text)
    if regex is None:
        return text
    match = regex.search(text)
    found = None if match is None else match.group(1 if regex.groups else 0)
    if found is None:
        raise ValueError(
            f"{place}: data.answer_regex={regex.pattern!r} finds nothing in {text[-60:]!r}; correct "
            "the expression or the row"
        )
    return found.strip()


def compile_regex(answer_regex: str | None) -> re.Pattern[str] | None:
    """data.answer_regex, compiled; ValueError when it is no regular expression."""
    try:
        return None if answer_regex is None else re.compile(answer_regex)
    except re.error as error:
        raise ValueError(
            f"data.answer_regex={answer_regex!r} is not a regular expression ({error})"
        ) from error
