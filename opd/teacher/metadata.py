"""The strings in the header of a request to a teacher server."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from opd.checked_json import read_json
from opd.config.student import DType


@dataclass(frozen=True, slots=True, kw_only=True)
class _TeacherHeader:
    metadata: Annotated[dict[str, str], Field(alias="__metadata__")]


def read_metadata(body: bytes) -> Mapping[str, str]:
    """The header's strings; safetensors' numpy reader checks the header but does not return it."""
    size = int.from_bytes(body[:8], "little")
    return read_json(
        body[8 : 8 + size], _TeacherHeader, "the body", "send an opd teacher request"
    ).metadata


def read_hidden_dtype(metadata: Mapping[str, str]) -> DType:
    """float32 or bfloat16, float32 where nothing is said; ValueError for another format."""
    found = metadata.get("hidden_dtype", DType.float32.value)
    if found not in (DType.float32.value, DType.bfloat16.value):
        raise ValueError(f"metadata 'hidden_dtype' is {found!r}, must be float32 or bfloat16")
    return DType(found)


def read_number(metadata: Mapping[str, str], name: str) -> float:
    """A number; ValueError when it is missing or none."""
    try:
        return float(metadata[name])
    except (KeyError, ValueError) as error:
        found = metadata.get(name)
        raise ValueError(f"metadata {name!r} is {found!r}, must be a number") from error


def read_count(metadata: Mapping[str, str], name: str) -> int:
    """A whole number from 0; ValueError when it is missing or none."""
    number = read_number(metadata, name)
    if not (number.is_integer() and 0 <= number < 2**31):
        raise ValueError(f"metadata {name!r} is {metadata[name]!r}, must be a whole number from 0")
    return int(number)
