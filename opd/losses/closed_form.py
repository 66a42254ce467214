"""A scalar whose gradients were computed along with it, so that no graph is kept for them."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def with_gradients(
    value: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor | None]
) -> torch.Tensor:
    """``value`` (scalar) with d value / d input = gradient for each pair (input, gradient).

    A gradient of None means that its input needs none. The gradients are scaled in place by the
    backward pass, which therefore runs once: torch refuses the second, and a second derivative.
    """
    inputs, gradients = zip(*pairs, strict=True)
    return _KnownGradients.apply(value, *inputs, *gradients)  # pyright: ignore[reportReturnType]


class _KnownGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, *rest: Any) -> torch.Tensor:
        inputs, gradients = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(*gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = [
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled, *[None for _ in scaled]
