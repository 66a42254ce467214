"""``train``: steps, batches and precision."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from opd.config.fields import bounded

if TYPE_CHECKING:
    from opd.config.schema import Config


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    pure_bf16 = "pure_bf16"


class MaskScores(StrEnum):
    """Scores of weights that a run can write for a mask rule."""

    none = "none"
    early_delta = "early_delta"
    adam_saliency = "adam_saliency"
    fisher = "fisher"
    first_gradient = "first_gradient"


class OnNonfinite(StrEnum):
    """What becomes of a step whose loss or gradient norm is not finite."""

    stop = "stop"
    skip = "skip"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Steps, batches and precision."""

    steps: int = bounded(100, least=0)
    """Optimizer steps."""
    prompts_per_step: int = bounded(64, least=1)
    """Prompts in one optimizer step, over all processes."""
    max_tokens_per_micro_batch: int = bounded(8192, least=1)
    """Tokens and padding in one forward and backward pass of a process; the result does not depend on it."""
    packing: bool = True
    """Lay several sequences into a row instead of padding, where the model's own code keeps them apart."""
    precision: Precision = Precision.bf16
    """bf16 keeps fp32 master weights; pure_bf16 does not and loses small updates."""
    dropout: bool = False
    """Train with the dropout of the student's config and adapter.lora_dropout; the engine never has any."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """A loss or gradient norm that is not finite: stop, or skip the optimizer step (ten in a row stop)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    stop_after: int | None = bounded(None, least=1)
    """Stop after this step as if interrupted; schedules still end at train.steps."""
    mask_scores: MaskScores = MaskScores.none
    """Write this score of every weight to scores.safetensors; fisher and first_gradient update no weight."""
    chunk_mib: int = bounded(256, least=1)
    """Largest float32 [tokens, vocabulary] tensor in memory at once, in MiB."""


def last_step(config: "Config") -> int:
    """The step after which this invocation of the run ends."""
    return min(config.train.steps, config.train.stop_after or config.train.steps)
