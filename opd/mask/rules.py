"""The rules that rank weights: each is a function that reads the scores of a chunk."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from opd.checkpoint.chunks import Chunk, ChunkReader, Progress, chunk_values, float32
from opd.checkpoint.stored import Stored
from opd.checkpoint.tensors import Checkpoint, open_checkpoint, open_tensors
from opd.config.functions import USER_ERRORS, describe_error, load_function
from opd.mask.spool import spool_scores


def delta(base: Checkpoint, other: Checkpoint, trained: str) -> ChunkReader:
    """|D|: how much a finished run changed each weight, both sides cast to bf16 before the difference.

    Raises ValueError when the trained model has other parameters than the base.
    """
    require_same_shapes(base, other, f"trained={trained}")

    def read(chunk: Chunk) -> np.ndarray:
        before, after = (chunk_values(side[chunk.name], chunk).bfloat16() for side in (base, other))
        return _refuse_nan(
            np.abs(float32(after) - float32(before)), chunk.name, f"|D| of {trained}"
        )

    return read


def near_zero(base: Checkpoint) -> ChunkReader:
    """-|W0|: the smallest weights first."""

    def read(chunk: Chunk) -> np.ndarray:
        return _refuse_nan(
            -np.abs(float32(chunk_values(base[chunk.name], chunk))), chunk.name, base.model
        )

    return read


def scores(base: Checkpoint, file: str) -> ChunkReader:
    """The scores of a safetensors file that holds one per weight under the weights' names."""
    checkpoint = open_tensors(Path(file))
    require_same_shapes(base, checkpoint, f"scores={file}")

    def read(chunk: Chunk) -> np.ndarray:
        return _refuse_nan(float32(chunk_values(checkpoint[chunk.name], chunk)), chunk.name, file)

    return read


def function(base: Checkpoint, name: str, spool: Path, progress: Progress) -> ChunkReader:
    """The scores of a user-defined function: (parameter name, weight) -> scores of the weight's shape."""
    score = load_function("function", name)

    def compute(parameter: str, stored: Stored) -> Iterator[np.ndarray]:
        weight = stored.read()
        try:
            found = score(parameter, weight)
        except USER_ERRORS as error:
            raise ValueError(
                f"function={name} failed for {parameter} ({describe_error(error)}); correct the function"
            ) from error
        if not isinstance(found, torch.Tensor):
            raise ValueError(
                f"function={name} returned a {type(found).__name__} for {parameter}, expected a tensor"
            )
        if tuple(found.shape) != stored.shape:
            raise ValueError(
                f"function={name} returned scores of shape {list(found.shape)} for {parameter}, "
                f"expected {list(stored.shape)}"
            )
        values = np.ascontiguousarray(float32(found).reshape(-1))
        yield _refuse_nan(values, parameter, f"function={name}")

    return spool_scores(base, compute, spool, progress, "scoring weights")


def trained_weights(trained: str) -> Checkpoint:
    """The weights of a run folder (its ``final/``), a model folder or a Hub id."""
    folder = Path(trained)
    if (folder / "final").is_dir():
        return open_checkpoint(str(folder / "final"))
    if (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"trained={trained} is a run without final/: let it finish, or name a checkpoint folder"
        )
    return open_checkpoint(trained)


def require_same_shapes(base: Checkpoint, other: Checkpoint, source: str) -> None:
    """ValueError unless both checkpoints list the same parameters with the same shapes."""
    for name in sorted({*base, *other}):
        ours, theirs = _shape(base.get(name)), _shape(other.get(name))
        if ours != theirs:
            raise ValueError(
                f"{source} does not belong to base={base.model}: {name} is {theirs} there and {ours} in "
                "the base; both must list the same parameters with the same shapes"
            )


def _shape(stored: Stored | None) -> str:
    return "absent" if stored is None else str(list(stored.shape))


def _refuse_nan(values: np.ndarray, name: str, source: str) -> np.ndarray:
    if np.isnan(values).any():
        raise ValueError(
            f"{name} of {source} contains NaN, which cannot be ranked: repair it first"
        )
    return values
