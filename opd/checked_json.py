"""JSON from outside, read as a declared shape: an error names its source and its field."""

import math
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, NonNegativeInt, TypeAdapter, ValidationError

MOST_SHOWN = 60
"""Characters of a wrong value in an error."""

MOST_NUMBERS = 1 << 62
"""A tensor of more numbers than this cannot be."""

Shape = TypeVar("Shape")


def _require_possible(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) > MOST_NUMBERS:
        raise ValueError("should be the shape of a tensor that can be")
    return shape


TensorShape = Annotated[tuple[NonNegativeInt, ...], AfterValidator(_require_possible)]
"""The shape of a tensor."""


def read_json(content: str | bytes, shape: type[Shape], source: object, remedy: str) -> Shape:
    """The value in ``content``, which has the types that ``shape`` declares.

    ``shape`` is a type such as ``dict[str, int]`` or a dataclass; fields that it does not
    declare are left out. ``ValueError`` in one sentence for malformed JSON, a missing field and a value of
    another type: it names ``source`` and the field, and ends with ``remedy``.
    """
    try:
        return _adapter(shape).validate_json(content, strict=True)
    except ValidationError as error:
        raise ValueError(f"{source}: {_explain(error)}; {remedy}") from None


def read_texts(fields: Mapping[str, str], shape: type[Shape], source: object, remedy: str) -> Shape:
    """The values that the texts of ``fields`` stand for, such as the metadata of a safetensors file.

    Numbers are read from their digits, and ``pydantic.Json[...]`` fields from JSON. Errors are those of
    ``read_json``.
    """
    try:
        return _adapter(shape).validate_python(dict(fields))
    except ValidationError as error:
        raise ValueError(f"{source}: {_explain(error)}; {remedy}") from None


@cache
def _adapter(shape: type[Shape]) -> TypeAdapter[Shape]:
    return TypeAdapter(shape)


def _explain(error: ValidationError) -> str:
    """The first of the faults as a clause, in one line."""
    first: Any = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    where = f"field {field!r}" if field else "the content"
    if first["type"] == "missing":
        return f"{where} is missing"
    message = str(first["msg"]).removeprefix("Input ").removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    if first["type"] == "json_invalid":
        return f"{where} is not JSON ({message})"
    shown = " ".join(repr(first["input"])[:MOST_SHOWN].split())
    return f"{where} {message}, found {shown}"
