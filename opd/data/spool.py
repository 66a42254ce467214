"""Prompts in a temporary file, so that memory does not grow with their number."""

import os
import pickle
import tempfile
from array import array
from collections.abc import Sequence
from operator import index
from typing import SupportsIndex, overload

from opd.types import Prompt


class SpooledPrompts(Sequence[Prompt]):
    """A list of prompts in a file of this process in TMPDIR; memory holds 8 bytes for each.

    The file has no name, so it is gone with the process. Positions are those of a list: what is
    read from it does not depend on where the prompts are.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="opd-prompts-")  # noqa: SIM115
        self._ends = array("q", [0])

    def append(self, prompt: Prompt) -> None:
        """Write a prompt behind the others."""
        raw = pickle.dumps(prompt, protocol=pickle.HIGHEST_PROTOCOL)
        self._file.write(raw)
        self._ends.append(self._ends[-1] + len(raw))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, place: SupportsIndex) -> Prompt: ...
    @overload
    def __getitem__(self, place: slice) -> list[Prompt]: ...
    def __getitem__(self, place: SupportsIndex | slice) -> Prompt | list[Prompt]:
        if isinstance(place, slice):
            return [self[at] for at in range(*place.indices(len(self)))]
        at = range(len(self))[index(place)]  # IndexError, and negative places, as of a list
        self._file.flush()
        start, end = self._ends[at], self._ends[at + 1]
        return pickle.loads(os.pread(self._file.fileno(), end - start, start))
