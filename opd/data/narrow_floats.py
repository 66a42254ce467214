"""Values of float16 and float32 columns, which Arrow hands out as Python's 64-bit floats.

float32's 0.1 comes as 0.10000000149011612; here it becomes 0.1, the shortest number that rounds to it.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pyarrow

Shorten = Callable[[Any], Any]


def narrow_columns(schema: "pyarrow.Schema") -> dict[str, Shorten]:
    """What shortens the values of each column that has 16 or 32-bit floats, also in lists and structs."""
    found = {field.name: _shortener(field.type) for field in schema}
    return {name: shorten for name, shorten in found.items() if shorten is not None}


def with_short_floats(row: Mapping[str, Any], narrow: Mapping[str, Shorten]) -> Mapping[str, Any]:
    """``row`` with the values of the ``narrow`` columns shortened."""
    if not narrow:
        return row
    return {**row, **{name: shorten(row[name]) for name, shorten in narrow.items() if name in row}}


def _shortener(kind: "pyarrow.DataType") -> Shorten | None:
    """What shortens a value of an Arrow type; None where there is nothing to shorten."""
    import pyarrow.types as types

    if types.is_float16(kind):
        return _shortest(np.float16)
    if types.is_float32(kind):
        return _shortest(np.float32)
    if types.is_dictionary(kind):
        return _shortener(kind.value_type)
    if types.is_struct(kind):
        fields = {field.name: _shortener(field.type) for field in kind}
        inner = {name: shorten for name, shorten in fields.items() if shorten is not None}
        return (lambda value: _in_struct(value, inner)) if inner else None
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = _shortener(kind.value_type)
        if item is not None:
            return lambda value: [item(one) for one in value] if isinstance(value, list) else value
    return None


def _shortest(kind: type[np.floating[Any]]) -> Shorten:
    return lambda value: None if value is None else float(str(kind(value)))


def _in_struct(value: Any, inner: Mapping[str, Shorten]) -> Any:
    return with_short_floats(value, inner) if isinstance(value, Mapping) else value
