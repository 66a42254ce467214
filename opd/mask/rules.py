"""What makes a weight worth training: each rule as scores of the coordinates of a chunk."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from opd.checkpoint.chunks import Chunk, Progress, chunk_values, float32
from opd.checkpoint.tensors import Checkpoint, Stored, open_checkpoint, open_tensors
from opd.config.functions import load_function
from opd.mask.spool import spooled

Read = Callable[[Chunk], np.ndarray]


def delta(base: Checkpoint, other: Checkpoint, trained: str) -> Read:
    """|D|: how far a finished run moved each weight, both sides cast to bf16 before the difference.

    Raises ValueError when the trained model has other parameters than the base.
    """
    require_same(base, other, f"trained={trained}")

    def read(chunk: Chunk) -> np.ndarray:
        before, after = (chunk_values(side[chunk.name], chunk).bfloat16() for side in (base, other))
        return _without_nan(
            np.abs(float32(after) - float32(before)), chunk.name, f"|D| of {trained}"
        )

    return read


def near_zero(base: Checkpoint) -> Read:
    """-|W0|: the smallest weights first."""

    def read(chunk: Chunk) -> np.ndarray:
        return _without_nan(
            -np.abs(float32(chunk_values(base[chunk.name], chunk))), chunk.name, base.model
        )

    return read


def scores(base: Checkpoint, file: str) -> Read:
    """The scores of a safetensors file that holds one per weight under the weights' names."""
    given = open_tensors(Path(file))
    require_same(base, given, f"scores={file}")

    def read(chunk: Chunk) -> np.ndarray:
        return _without_nan(float32(chunk_values(given[chunk.name], chunk)), chunk.name, file)

    return read


def function(base: Checkpoint, name: str, spool: Path, progress: Progress) -> Read:
    """The scores of a function of the user's: (parameter's name, weight) -> scores of its shape."""
    rank = load_function("function", name)

    def scored(parameter: str, stored: Stored) -> Iterator[np.ndarray]:
        weight = stored.read()
        found = rank(parameter, weight)
        if tuple(found.shape) != stored.shape:
            raise ValueError(
                f"function={name} returned scores of shape {list(found.shape)} for {parameter}, "
                f"expected {list(stored.shape)}"
            )
        values = np.ascontiguousarray(float32(found).reshape(-1))
        yield _without_nan(values, parameter, f"function={name}")

    return spooled(base, scored, spool, progress, "scoring weights")


def trained_weights(trained: str) -> Checkpoint:
    """The weights of a run folder (its ``final/``), a model folder or a hub id."""
    folder = Path(trained)
    if (folder / "final").is_dir():
        return open_checkpoint(str(folder / "final"))
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"trained={trained} is a run without final/: let it finish, or name a checkpoint folder"
        )
    return open_checkpoint(trained)


def require_same(base: Checkpoint, other: Checkpoint, what: str) -> None:
    """ValueError unless both list the same parameters in the same shapes."""
    for name in sorted({*base, *other}):
        here, there = _shape(base.get(name)), _shape(other.get(name))
        if here != there:
            raise ValueError(
                f"{what} does not belong to base={base.model}: {name} is {there} there and {here} in "
                "the base; both must list the same parameters in the same shapes"
            )


def _shape(stored: Stored | None) -> str:
    return "absent" if stored is None else str(list(stored.shape))


def _without_nan(values: np.ndarray, name: str, source: str) -> np.ndarray:
    if np.isnan(values).any():
        raise ValueError(f"{name} of {source} holds NaN, which has no rank: mend the file first")
    return values
