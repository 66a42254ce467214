"""Rows of tensors: plain numbers that JSON holds, of tensors as stored and of the parts of fused ones."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def as_stored(rows: Sequence[Row]) -> list[Row]:
    """The rows of tensors as the checkpoint stores them: no parts of fused ones."""
    return [row for row in rows if row["part_of"] is None]


def as_parts(rows: Sequence[Row]) -> list[Row]:
    """The rows in which a fused tensor is represented by its parts."""
    return [row for row in rows if not row["is_fused"]]
