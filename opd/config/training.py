"""How a gradient becomes a step, and where."""

from dataclasses import dataclass
from enum import StrEnum

from opd.config.fields import knob


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    pure_bf16 = "pure_bf16"


class LearningRateSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class TrainingEngine(StrEnum):
    deepspeed = "deepspeed"
    torch = "torch"


class Watched(StrEnum):
    none = "none"
    early_delta = "early_delta"
    adam_saliency = "adam_saliency"
    fisher = "fisher"
    first_gradient = "first_gradient"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """How a gradient becomes a step."""

    lr: float = knob(1e-6, above=0)
    """Peak learning rate."""
    weight_decay: float = knob(0.0, least=0)
    """Weight decay on matrices (decoupled for AdamW); vectors are never decayed."""
    schedule: LearningRateSchedule = LearningRateSchedule.constant
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = knob(0, least=0)
    """Steps in which the learning rate rises linearly from zero."""
    min_lr_ratio: float = knob(0.0, least=0, most=1)
    """Where linear and cosine schedules end, as a share of the peak."""
    clip: float = knob(1.0, least=0)
    """Largest global gradient norm; 0 does not clip."""


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov and Hutter)."""

    betas: list[float] = knob([0.9, 0.999])
    """Decay of the first and second moment."""
    eps: float = knob(1e-8, above=0)
    """Added to the root of the second moment."""


@dataclass(kw_only=True, slots=True)
class SGDConfig(OptimConfig):
    """Stochastic gradient descent."""

    lr: float = knob(1e-2, above=0)
    """Peak learning rate."""
    momentum: float = knob(0.9, least=0, below=1)
    """Share of the last step that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How much is learned, in what pieces and in what numbers."""

    steps: int = knob(100, least=0)
    """Optimizer steps."""
    prompts_per_step: int = knob(64, least=1)
    """Prompts in one optimizer step, over all processes."""
    micro_tokens: int = knob(8192, least=1)
    """Padded tokens in one forward and backward pass of one process; the result does not depend on it."""
    precision: Precision = Precision.bf16
    """bf16 keeps fp32 master weights; pure_bf16 does not and loses small updates."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    stop_after: int | None = knob(None, least=1)
    """Stop after so many steps as if interrupted; schedules go on counting to train.steps."""
    scores: Watched = Watched.none
    """Leave this score of every weight in scores.safetensors; fisher and first_gradient move nothing."""
    chunk_mib: int = knob(256, least=1)
    """Largest float32 [tokens, vocabulary] tensor that exists at once, in MiB."""


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """What changes when the machine changes."""

    processes: int = knob(1, least=1)
    """Training processes on this machine, one per GPU."""
    engine: TrainingEngine = TrainingEngine.deepspeed
    """deepspeed, or torch: one process without DeepSpeed."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file with stage, offload and bucket sizes, as in launch/deepspeed/."""
    threads: int | None = knob(None, least=1)
    """CPU threads of each process; by default the cores shared out evenly."""
