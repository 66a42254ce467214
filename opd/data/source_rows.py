"""The rows of one or several data sets, each with a uid that no other row of them has."""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from opd.config.data import DataConfig
from opd.config.functions import USER_ERRORS, describe_error, load_function
from opd.config.sources import DataSource
from opd.data.arrow_rows import Row
from opd.data.columns import read_uid
from opd.data.rows import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedRow:
    """A row, where it is, its uid, and the number of its source."""

    source: int
    uid: str
    place: str
    row: Mapping[str, Any]


def numbered_rows(sources: Sequence[DataSource]) -> Iterator[NumberedRow]:
    """The rows of ``sources``, one source after the other.

    uid: the row's ``uid`` when it has one, else its number in the source; of several sources the
    number of the source and a colon come in front, so that rows of two sources never share one.
    """
    for number, source in enumerate(sources):
        prefix = f"{number}:" if len(sources) > 1 else ""
        for index, (place, row) in enumerate(source_rows(source.path, source.data)):
            uid = prefix + read_uid(place, row, index)
            yield NumberedRow(source=number, uid=uid, place=place, row=row)


def source_rows(source: str, data: DataConfig) -> Iterator[Row]:
    """(place, row) of the rows that ``data`` selects, each converted by ``data.function`` if it is set."""
    rows = read_rows(
        source,
        split=data.split,
        subset=data.subset,
        revision=data.revision,
        streaming=data.streaming,
    )
    if data.function is not None:
        rows = _converted(rows, data.function)
    return islice(rows, data.limit)


def _converted(rows: Iterator[Row], name: str) -> Iterator[Row]:
    convert = load_function("data.function", name)
    for place, row in rows:
        try:
            converted: Any = convert(dict(row))
        except USER_ERRORS as error:
            raise ValueError(
                f"{place}: data.function={name} failed ({describe_error(error)}); correct the function "
                "or the row"
            ) from error
        if converted is None:
            continue
        if not isinstance(converted, Mapping):
            raise ValueError(
                f"{place}: data.function={name} returned a {type(converted).__name__}; expected a dict "
                "(the row to use) or None (drop it)"
            )
        yield place, converted


class UniqueUids:
    """Finds a uid that occurs twice; memory holds 8 bytes for each."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, uid: str) -> None:
        """Note the uid of one row."""
        self._hashes.append(hash(uid))

    def require(self, reread: Callable[[], Iterator[NumberedRow]]) -> None:
        """ValueError with both places for the first uid that occurs again.

        ``reread`` reads the rows once more, where two uids have one hash.
        """
        hashes, counts = np.unique(np.asarray(self._hashes), return_counts=True)
        twice = {int(value) for value in hashes[counts > 1]}
        first_seen: dict[str, str] = {}
        for row in reread() if twice else ():
            if hash(row.uid) not in twice:
                continue
            if row.uid in first_seen:
                raise ValueError(
                    f"{row.place}: found uid {row.uid!r} again, first at {first_seen[row.uid]}; "
                    "make each uid unique, or leave uid out"
                )
            first_seen[row.uid] = row.place
