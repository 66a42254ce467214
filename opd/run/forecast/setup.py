"""A recipe and its models as the numbers that memory and time depend on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.config.adapter import LoraConfig
from opd.config.launch import LaunchEngine, read_launch_file
from opd.config.mask import (
    LIVE_RULES,
    DiscoverMaskConfig,
    FileMaskConfig,
    MaskRule,
    MaskTraining,
    active_mask,
)
from opd.config.optim import AdamWConfig, SGDConfig
from opd.config.schema import Config
from opd.config.student import AUTO_ATTENTION
from opd.config.train import Precision
from opd.mask.mask import Mask
from opd.run.model_facts import ModelFacts

UNKNOWN_DENSITY = 0.175
"""Share of the weights that a mask by a threshold is taken to keep; 17.5 % in arXiv 2606.13657."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one rank does in a step.

    ``sequences`` of ``width`` tokens, prompt and completion, in micro-batches of ``rows``; ``targets`` tokens
    of a micro-batch are learned from.
    """

    sequences: int
    width: int
    rows: int
    targets: int

    @property
    def micro_batches(self) -> int:
        return math.ceil(self.sequences / self.rows)

    @property
    def tokens(self) -> int:
        """Padded tokens of a micro-batch."""
        return self.rows * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSetup:
    """How a student is trained. ``zero`` is None without DeepSpeed.

    ``trained`` counts the numbers that the optimizer changes; ``compact`` those among them that are stored
    beside a dense weight (a mask), ``restored`` the weights of which an initial copy is kept.
    ``head_trained``: the output head gets a gradient. ``states`` are the optimizer's numbers for each
    trained one.
    """

    facts: ModelFacts
    trained: int
    compact: int
    restored: int
    head_trained: bool
    ranks: int
    cuda: bool
    zero: int | None
    precision: Precision
    states: int
    decays: bool
    offload_states: bool
    offload_weights: bool
    bucket: int
    overlap: bool
    checkpointing: bool
    eager: bool
    chunk_bytes: int
    work: Work

    @property
    def element(self) -> int:
        """Bytes of a weight, a gradient and an activation."""
        return 4 if self.precision == Precision.fp32 or self.autocast else 2

    @property
    def compute(self) -> int:
        """Bytes of a number in a matrix product."""
        return 4 if self.precision == Precision.fp32 else 2

    @property
    def autocast(self) -> bool:
        """fp32 weights that are cast in each matrix product."""
        return self.zero is None and self.precision == Precision.bf16

    @property
    def master(self) -> int:
        """Bytes of a number in a master weight and in an optimizer state."""
        return 2 if self.precision == Precision.pure_bf16 else 4

    @property
    def share(self) -> float:
        """Of the trained numbers, whose optimizer states this rank holds."""
        return 1 / self.ranks if self.zero else 1.0


def step_work(config: Config, ranks: int, prompt_tokens: int) -> Work:
    """Every completion as long as rollout.max_tokens, every prompt of ``prompt_tokens``: at most this."""
    width = prompt_tokens + config.rollout.max_tokens
    sequences = math.ceil(config.train.prompts_per_step / ranks) * config.rollout.n
    rows = min(max(1, config.train.max_tokens_per_micro_batch // width), sequences)
    kept = math.ceil(config.rollout.max_tokens * config.loss.prefix_fraction)
    return Work(sequences=sequences, width=width, rows=rows, targets=rows * kept)


def read_learner(
    config: Config,
    facts: ModelFacts,
    *,
    ranks: int,
    cuda: bool,
    prompt_tokens: int,
    density: float | None,
) -> TrainingSetup:
    """The learner of a recipe; ``density`` is that of its mask, None trains every weight or adapters."""
    masked = density is not None and density < 1
    compact = masked and _mask_training(config) == MaskTraining.compact
    lora = isinstance(config.adapter, LoraConfig)
    trained = facts.parameters
    if isinstance(config.adapter, LoraConfig):
        trained = facts.adapters(config.adapter)
    elif compact:
        assert density is not None
        trained = round(density * facts.parameters)
    deepspeed = config.launch.engine == LaunchEngine.deepspeed
    zero = _zero_file(config.launch.deepspeed)
    return TrainingSetup(
        facts=facts,
        trained=trained,
        compact=trained if compact else 0,
        restored=facts.parameters if masked and not compact else 0,
        head_trained=not lora,
        ranks=ranks,
        cuda=cuda,
        zero=config.zero if deepspeed else None,
        precision=config.train.precision,
        states=_states(config),
        decays=config.optim.weight_decay > 0,
        offload_states=_device(zero, "offload_optimizer") != "none",
        offload_weights=config.zero == 3 and _device(zero, "offload_param") != "none",
        bucket=int(zero.get("reduce_bucket_size") or 5e8),
        overlap=bool(zero.get("overlap_comm", config.zero == 3)),
        checkpointing=config.train.gradient_checkpointing,
        eager=config.student.attn_implementation == "eager"
        or (config.student.attn_implementation == AUTO_ATTENTION and facts.softcap),
        chunk_bytes=config.train.chunk_mib << 20,
        work=step_work(config, ranks, prompt_tokens),
    )


def mask_densities(config: Config) -> dict[str, float | None]:
    """What is trained, by name, and the density of each: one entry, or two for a study with arms.

    A study trains every weight first and its masks after that. The densities of masks that are found by a
    threshold are not known before: ``UNKNOWN_DENSITY``.
    """
    mask = active_mask(config)
    if mask is None:
        return {"every weight": None}
    file = mask.path if isinstance(mask, FileMaskConfig) else mask.like
    density = None if isinstance(mask, FileMaskConfig) else mask.density
    if density is None:
        is_there = file is not None and Path(file).is_file()
        density = Mask.read(file).density if file and is_there else UNKNOWN_DENSITY
    first: dict[str, float | None] = {"every weight": None} if _trains_before(mask) else {}
    return {**first, "the mask": density}


def _trains_before(mask: FileMaskConfig | DiscoverMaskConfig) -> bool:
    """Whether every weight is trained in a run before the mask can be computed."""
    if isinstance(mask, FileMaskConfig):
        return False
    if mask.rule == MaskRule.delta:
        return mask.trained is None
    return mask.rule in LIVE_RULES and mask.scores is None


def _mask_training(config: Config) -> MaskTraining:
    mask = active_mask(config)
    assert isinstance(mask, FileMaskConfig | DiscoverMaskConfig)
    return mask.training


def _states(config: Config) -> int:
    """Numbers per trained one: two moments of AdamW, the momentum of SGD."""
    match config.optim:
        case AdamWConfig():
            return 2
        case SGDConfig(momentum=momentum):
            return 1 if momentum else 0
    raise AssertionError(f"no optimizer for {type(config.optim).__name__}")


def _zero_file(path: str | None) -> dict[str, Any]:
    return read_launch_file(path).get("zero_optimization", {}) if path else {}


def _device(zero: Mapping[str, Any], key: str) -> str:
    return (zero.get(key) or {}).get("device", "none")
