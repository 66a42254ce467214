"""Optimizers of torch, and the learning rate of every step."""

import math

import torch

from opd.config.training import AdamWConfig, LearningRateSchedule, OptimConfig, SGDConfig
from opd.train.compact import matrices_and_vectors


def build_optimizer(student: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Matrices with ``config.weight_decay``, vectors without; the learning rate is set step by step.

    It starts at 0 so that a training engine's warm-up step on zero gradients moves nothing.
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


def lr_at(step: int, steps: int, config: OptimConfig) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``steps``: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    floor = config.min_lr_ratio
    match config.schedule:
        case LearningRateSchedule.constant:
            share = 1.0
        case LearningRateSchedule.linear:
            share = 1.0 - (1.0 - floor) * done
        case LearningRateSchedule.cosine:
            share = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return config.lr * share
