"""Scores that cost much to compute, kept in a file: 4 bytes a weight."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from opd.checkpoint.chunks import Chunk, Progress
from opd.checkpoint.tensors import Checkpoint, Stored


def spooled(
    base: Checkpoint,
    scores: Callable[[str, Stored], Iterator[np.ndarray]],
    spool: Path,
    progress: Progress,
    doing: str,
) -> Callable[[Chunk], np.ndarray]:
    """Compute every tensor's ``scores`` (flat float32 parts in order) once; read them by chunk.

    The caller removes the file ``spool``.
    """
    starts: dict[str, int] = {}
    written, total = 0, base.numel
    with spool.open("wb") as file:
        for name, stored in base.items():
            starts[name] = written
            for part in scores(name, stored):
                file.write(part.data)
                written += len(part)
                progress(doing, written / total)
    held = np.memmap(spool, np.float32, "r")

    def read(chunk: Chunk) -> np.ndarray:
        start = starts[chunk.name]
        return np.array(held[start + chunk.start : start + chunk.stop])

    return read
