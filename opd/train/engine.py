"""The training engine, as the learner uses it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from opd.batch import Batch, LossOutput
from opd.interfaces import Loss
from opd.train.saved_states import Layout


class TrainingEngine(Protocol):
    """Runs the student forward and backward, and steps its optimizer.

    "collective" means that every rank calls the method, with the same parameters in the same order.
    """

    @property
    def layout(self) -> Layout:
        """How the state is divided; ``load`` reads what an engine of an equal layout saved."""
        ...

    def forward(self, batch: Batch, loss: Loss | None) -> LossOutput:
        """Run the student; without a loss, ``total`` holds the targets' log-probs [N]."""
        ...

    def backward(self, total: torch.Tensor, *, last: bool) -> None:
        """Accumulate the gradient of ``total``; ``last`` marks the step's last micro-batch."""
        ...

    def step(self, lr: float) -> float:
        """Clip, take one optimizer step, clear gradients; returns the gradient norm before clipping.

        Where the norm is not finite, on all ranks alike, no weight and no optimizer state changes.
        """
        ...

    @contextmanager
    def gathered(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
        """Inside, each parameter holds its full tensor; collective."""
        ...

    def parts(self, parameter: torch.nn.Parameter) -> list[tuple[torch.Tensor, int]]:
        """This rank's parts of a parameter: flat writable views, each with its first coordinate."""
        ...

    def rewrite(
        self, parameter: torch.nn.Parameter, change: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Replace a trained parameter and its master by ``change`` of the full master; collective."""
        ...

    def full_state(self, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
        """The float32 master ("master") or the optimizer's state ``key``, whole; collective."""
        ...

    def full_states(
        self, parameters: Sequence[torch.nn.Parameter], keys: Sequence[str]
    ) -> list[list[torch.Tensor]]:
        """``full_state`` of each parameter and each key, flat, gathered at once; collective."""
        ...

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The gradient of a trained parameter before clipping, whole; collective.

        To be called between the step's last ``backward`` and ``step``.
        """
        ...

    def save(self, folder: str) -> None:
        """Write trained weights, masters and optimizer state of this rank into ``folder``; collective."""
        ...

    def load(self, folder: str) -> None:
        """Restore what ``save`` wrote in an engine of the same layout, bit for bit; collective."""
        ...

    def restore(self, folder: str, saved: Layout) -> None:
        """Restore what ``save`` wrote in an engine of layout ``saved``, divided anew; collective."""
        ...
