"""A trained model with some of its changed weights reverted, to find which of them it needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch

from opd.checkpoint.chunks import Chunk, chunk_values, chunks, float32
from opd.checkpoint.companions import copy_companions, require_free
from opd.checkpoint.files import model_folder
from opd.checkpoint.tensors import Checkpoint
from opd.checkpoint.writer import write_tensors
from opd.mask.rules import require_same_shapes
from opd.mask.top_k import Selection, TopKQuery


class Order(StrEnum):
    """Which changes are reverted first."""

    smallest = "smallest"
    largest = "largest"
    random = "random"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangedWeights:
    """The weights that differ between two models with both sides in ``dtype``.

    Raises ValueError when the models list different parameters.
    """

    base: Checkpoint
    trained: Checkpoint
    dtype: torch.dtype

    def __post_init__(self) -> None:
        require_same_shapes(self.base, self.trained, f"trained={self.trained.model}")

    def count(self) -> int:
        """Number of changed weights."""
        sizes = {name: stored.numel for name, stored in self.base.items()}
        return sum(int(np.count_nonzero(self._size(p))) for p in chunks(sizes, self.base))

    def revert(self, count: int, order: Order, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
        """The trained model's tensors with exactly ``count`` changes reverted to the base's values.

        Ties are broken at random, by the seed. Unchanged weights stay as they are.
        """

        def score(chunk: Chunk) -> np.ndarray:
            size = self._size(chunk)
            ranked = {Order.smallest: -size, Order.largest: size, Order.random: 0 * size}[order]
            return np.where(size > 0, ranked, np.float32(-np.inf)).astype(np.float32)

        selection = Selection(self.base.shapes, f"{seed} prune {order.value}")
        query = TopKQuery(names=tuple(self.base), quotas=(count,), scores=score)
        for name, index in selection.select(query, selection.find_threshold(query)):
            tensor = self.trained[name].read().clone()
            base = self.base[name].read().reshape(-1)
            chosen = index.long()
            tensor.view(-1)[chosen] = base[chosen].to(tensor.dtype)
            yield name, tensor

    def write(self, count: int, order: Order, seed: int, out: Path) -> None:
        """Write ``revert`` as a Hugging Face folder, with the trained model's other files."""
        require_free(out)
        out.mkdir(parents=True, exist_ok=True)
        tensors = self.revert(count, order, seed)
        write_tensors(out / "model.safetensors", tensors, lambda: {"format": "pt"})
        copy_companions(model_folder(self.trained.model), out)

    def _size(self, chunk: Chunk) -> np.ndarray:
        """abs(D), float32; the difference of two numbers is 0 only where they are equal."""
        before, after = (
            chunk_values(side[chunk.name], chunk).to(self.dtype)
            for side in (self.base, self.trained)
        )
        return np.abs(float32(after) - float32(before))


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share; 95 % for the default z (Wilson 1927)."""
    share, weight = correct / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * (share * (1 - share) / total + weight / (4 * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)
