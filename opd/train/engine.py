"""What the learner needs of a training engine."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from opd.batch import Batch, LossOutput
from opd.interfaces import Loss


class TrainingEngine(Protocol):
    """What the learner needs of an engine."""

    def forward(self, batch: Batch, loss: Loss | None) -> LossOutput:
        """Run the student; with no loss, ``total`` holds the targets' log-probs [N]."""
        ...

    def backward(self, total: torch.Tensor, *, last: bool) -> None:
        """Add the gradient of ``total``; ``last`` ends the step's accumulation."""
        ...

    def step(self, lr: float) -> float:
        """Clip, take one optimizer step, clear gradients; the gradient norm before clipping."""
        ...

    @contextmanager
    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """Inside, each parameter holds its full tensor."""
        ...

    def parts(self, parameter: torch.nn.Parameter) -> list[tuple[torch.Tensor, int]]:
        """What this rank holds of a parameter: flat, writable, and the coordinate each starts at."""
        ...

    def rewrite(
        self, parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Replace a trained parameter and its master by ``change`` of the full master; collective."""
        ...

    def full_state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The float32 master ("master") or the optimizer's state ``key``, in full; collective."""
        ...

    def full_states(
        self, parameters: Sequence[torch.nn.Parameter], keys: Sequence[str]
    ) -> list[list[torch.Tensor]]:
        """``full_state`` of each parameter and each key, flat, gathered at once; collective."""
        ...

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """What the step will see of a trained parameter, before clipping; after the last backward
        and before the step; collective."""
        ...

    def save(self, folder: str) -> None:
        """Weights that are trained, masters and optimizer state of this rank."""
        ...

    def load(self, folder: str) -> None:
        """Undo of ``save``."""
        ...
