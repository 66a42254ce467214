"""Scores that are expensive to compute, kept in a file: 4 bytes a weight."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from opd.checkpoint.chunks import Chunk, ChunkReader, Progress
from opd.checkpoint.stored import Stored
from opd.checkpoint.tensors import Checkpoint


def spool_scores(
    base: Checkpoint,
    scores: Callable[[str, Stored], Iterable[np.ndarray]],
    file: Path,
    progress: Progress,
    task: str,
) -> ChunkReader:
    """Compute each tensor's ``scores`` (flat float32 parts in order) once; read them by chunk.

    The caller removes ``file``. ``task`` is what ``progress`` shows.
    """
    starts: dict[str, int] = {}
    written, total = 0, base.numel
    with file.open("wb") as out:
        for name, stored in base.items():
            starts[name] = written
            for part in scores(name, stored):
                out.write(part.data)
                written += len(part)
                progress(task, written / total)
    values = np.memmap(file, np.float32, "r")

    def read(chunk: Chunk) -> np.ndarray:
        start = starts[chunk.name]
        return np.array(values[start + chunk.start : start + chunk.stop])

    return read
