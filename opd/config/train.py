"""``train``: how much is learned, in what batches and in what precision."""

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
    """The scores of weights that a run can leave behind for a mask rule."""

    none = "none"
    early_delta = "early_delta"
    adam_saliency = "adam_saliency"
    fisher = "fisher"
    first_gradient = "first_gradient"


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """How much is learned, in what batches and in what precision."""

    steps: int = bounded(100, least=0)
    """Optimizer steps."""
    prompts_per_step: int = bounded(64, least=1)
    """Prompts in one optimizer step, over all processes."""
    max_tokens_per_micro_batch: int = bounded(8192, least=1)
    """Padded tokens in one forward and backward pass of one process; the result does not depend on it."""
    precision: Precision = Precision.bf16
    """bf16 keeps fp32 master weights; pure_bf16 does not and loses small updates."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    stop_after: int | None = bounded(None, least=1)
    """Stop after so many steps as if interrupted; schedules still count to train.steps."""
    mask_scores: MaskScores = MaskScores.none
    """Write this score of every weight to scores.safetensors; fisher and first_gradient move nothing."""
    chunk_mib: int = bounded(256, least=1)
    """Largest float32 [tokens, vocabulary] tensor that exists at once, in MiB."""


def last_step(config: "Config") -> int:
    """The step after which this call of the run ends."""
    return min(config.train.steps, config.train.stop_after or config.train.steps)
