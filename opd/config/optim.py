"""``optim``: the optimizer and its learning rate."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from opd.config.fields import bounded

if TYPE_CHECKING:
    from opd.config.schema import Config


class LearningRateSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """The optimizer and its learning rate."""

    lr: float = bounded(1e-6, above=0, most=1e6)
    """Peak learning rate."""
    weight_decay: float = bounded(0.0, least=0)
    """Weight decay on matrices (decoupled for AdamW); vectors are never decayed."""
    schedule: LearningRateSchedule = LearningRateSchedule.constant
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = bounded(0, least=0)
    """Steps in which the learning rate rises linearly from zero; at most train.steps are used."""
    min_lr_ratio: float = bounded(0.0, least=0, most=1)
    """Final learning rate of linear and cosine schedules, as a share of the peak."""
    max_grad_norm: float = bounded(1.0, least=0)
    """Largest global gradient norm; 0 does not clip."""


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov and Hutter)."""

    betas: list[float] = bounded([0.9, 0.999])
    """Decay rates of the first and second moments."""
    eps: float = bounded(1e-8, above=0)
    """Added to the square root of the second moment."""


@dataclass(kw_only=True, slots=True)
class SGDConfig(OptimConfig):
    """Stochastic gradient descent."""

    lr: float = bounded(1e-2, above=0, most=1e6)
    """Peak learning rate."""
    momentum: float = bounded(0.9, least=0, below=1)
    """Momentum factor."""
    nesterov: bool = False
    """Nesterov momentum."""


CHOICES = {"adamw": AdamWConfig, "sgd": SGDConfig}


def momentum_is_needed_for_nesterov(config: "Config") -> str | None:
    """torch refuses Nesterov without momentum."""
    if isinstance(config.optim, SGDConfig) and config.optim.nesterov and not config.optim.momentum:
        return "optim.nesterov=true needs optim.momentum above 0"
    return None


def betas_are_two(config: "Config") -> str | None:
    """AdamW has two moments."""
    if isinstance(config.optim, AdamWConfig):
        betas = config.optim.betas
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            return f"optim.betas={list(betas)}: allowed are two numbers of at least 0 and below 1"
    return None


RULES = (momentum_is_needed_for_nesterov, betas_are_two)


def clipped_warmup(config: "Config") -> int:
    """Warm-up steps, at most train.steps, so that a short trial of a long recipe reaches the peak."""
    return min(config.optim.warmup_steps, config.train.steps)
