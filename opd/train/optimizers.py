"""Optimizers of torch, and the learning rate of each step."""

import math
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass

import torch

from opd.config.optim import AdamWConfig, LearningRateSchedule, OptimConfig, SGDConfig
from opd.train.compact import full_shape, matrices_and_vectors


def build_optimizer(student: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of the trained parameters: matrices with ``config.weight_decay``, vectors without.

    The learning rate is set before each step. It starts at 0, so that an engine's set-up step on zero
    gradients changes nothing.
    """
    matrices, vectors = matrices_and_vectors(student)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    match config:
        case AdamWConfig():
            beta1, beta2 = config.betas
            return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=config.eps)
        case SGDConfig():
            return torch.optim.SGD(
                groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov
            )
    raise AssertionError(f"no optimizer for {type(config).__name__}")


def named_groups(student: torch.nn.Module) -> list[dict[str, int]]:
    """Name and number of elements of each trained parameter, for each group of ``build_optimizer``."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    groups = [group for group in matrices_and_vectors(student) if group]
    return [{names[id(p)]: math.prod(full_shape(p)) for p in group} for group in groups]


def create_states(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]
) -> None:
    """Create the optimizer's states of ``parameters``, which torch creates in the first step.

    That step then needs no more memory than every other, and computes the same bits. Optimizers of other
    classes are left as they are.
    """
    for parameter in parameters:
        state = optimizer.state[parameter]
        match optimizer:
            case torch.optim.AdamW():
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            case torch.optim.SGD() if optimizer.defaults["momentum"]:
                # the sum of -0.0 and a gradient is the gradient, also where that is a zero
                state["momentum_buffer"] = torch.full_like(parameter, -0.0)


@dataclass(frozen=True, slots=True)
class LearningRate:
    """The learning rate of optimizer step ``step`` (from 0): linear warm-up, then the schedule."""

    config: OptimConfig
    _: KW_ONLY
    steps: int
    warmup_steps: int

    def __call__(self, step: int) -> float:
        config = self.config
        if step < self.warmup_steps:
            return config.lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        floor = config.min_lr_ratio
        match config.schedule:
            case LearningRateSchedule.constant:
                share = 1.0
            case LearningRateSchedule.linear:
                share = 1.0 - (1.0 - floor) * done
            case LearningRateSchedule.cosine:
                share = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        return config.lr * share
