"""The safe rule: weights that are small, or that a matrix's principal directions do not need."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from opd.checkpoint.chunks import CHUNK, ChunkReader, Progress, float32
from opd.checkpoint.stored import Stored
from opd.checkpoint.tensors import Checkpoint
from opd.mask.spool import spool_scores


def safe(base: Checkpoint, rank_share: float, spool: Path, progress: Progress) -> ChunkReader:
    """-min(rank of |W0|, rank of |P|) within each matrix, both as shares from 0 to 1.

    P is the reconstruction of W0 from its ceil(rank_share * min dim) largest singular directions.
    The highest scores are the union of the share t of the smallest weights and the share t of the
    least principal ones, with t as large as the density allows. Vectors have no directions; their
    ranks are those of |w| alone. Ranks are resolved to bfloat16. Scores need a decomposition, so they
    are kept in the file ``spool``, 4 bytes a weight; the caller removes it.
    """
    return spool_scores(
        base,
        lambda _, stored: _scores(stored, rank_share),
        spool,
        progress,
        "decomposing matrices",
    )


def _scores(stored: Stored, rank_share: float) -> Iterator[np.ndarray]:
    """Scores of a tensor, a block of rows at a time."""
    is_matrix = len(stored.shape) > 1
    rows = next(iter(stored.shape)) if is_matrix else 1
    matrix = stored.read().reshape(rows, stored.numel // rows)
    rank_of_size = _ranks(np.abs(float32(part)) for part in _blocks(matrix))
    if not is_matrix:
        yield -rank_of_size(np.abs(float32(matrix))).reshape(-1)
        return
    reconstruct = _reconstruction(matrix, max(1, math.ceil(rank_share * min(matrix.shape))))
    rank_of_principal = _ranks(reconstruct(part) for part in _blocks(matrix))
    for part in _blocks(matrix):
        ranks = rank_of_size(np.abs(float32(part))), rank_of_principal(reconstruct(part))
        yield -np.minimum(*ranks).reshape(-1)


def _blocks(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from matrix.split(max(1, CHUNK // max(1, matrix.shape[1])))


def _reconstruction(matrix: torch.Tensor, rank: int) -> Callable[[torch.Tensor], np.ndarray]:
    """A function from rows of a matrix to |their rank-r reconstruction|.

    Rows are projected on the leading right singular vectors. These come from the Gram matrix of the
    smaller side in float64, which loses small singular values, not the directions of large ones.
    """
    rows, width = matrix.shape
    gram = torch.zeros(min(rows, width), min(rows, width), dtype=torch.float64)
    for part in _blocks(matrix if rows > width else matrix.T):
        part = part.double()
        gram += part.T @ part
    vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].float()
    if rows <= width:  # left singular vectors; their images span the right singular space
        image = torch.cat([part.float() @ vectors for part in _blocks(matrix.T)])
        vectors = torch.linalg.qr(image).Q
    return lambda part: ((part.float() @ vectors) @ vectors.T).abs().numpy()


def _ranks(values: Iterator[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """A function from values to the share of ``values`` that is at most as large; all are >= 0."""
    counts = np.zeros(1 << 16, np.int64)
    for part in values:
        counts += np.bincount(_bfloat16(part), minlength=1 << 16)
    shares = (np.cumsum(counts) / max(1, counts.sum())).astype(np.float32)
    return lambda part: shares[_bfloat16(part)].reshape(part.shape)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    return (bits >> np.uint32(16)).astype(np.int64)
