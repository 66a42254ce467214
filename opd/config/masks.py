"""Which weights learn."""

from dataclasses import dataclass
from enum import StrEnum

from opd.config.fields import knob


class MaskRule(StrEnum):
    delta = "delta"
    early_delta = "early_delta"
    adam_saliency = "adam_saliency"
    fisher = "fisher"
    first_gradient = "first_gradient"
    near_zero = "near_zero"
    safe = "safe"
    random = "random"
    magnitude_matched = "magnitude_matched"
    scores = "scores"


class MaskBudget(StrEnum):
    vars()["global"] = "global"  # a word of Python's, and Hydra reads names
    tensor = "tensor"
    module = "module"


class MaskStructure(StrEnum):
    coordinates = "coordinates"
    rows = "rows"
    columns = "columns"


class StudyArm(StrEnum):
    full = "full"
    discovered = "discovered"
    random = "random"
    magnitude_matched = "magnitude_matched"


class MaskTraining(StrEnum):
    compact = "compact"
    restore = "restore"


class Others(StrEnum):
    refuse = "refuse"
    drop = "drop"


@dataclass(kw_only=True, slots=True)
class RuleConfig:
    """How a mask is discovered."""

    rule: MaskRule = MaskRule.delta
    """What makes a weight worth training; docs/masks.md explains each."""
    density: float | None = knob(None, above=0, most=1)
    """Share of all weights to keep, met exactly; rule=delta and rule=scores take a threshold instead."""
    threshold: float | None = knob(None, least=0)
    """Keep scores above this instead of an exact share; for rule=delta |D| of both sides in bf16."""
    budget: MaskBudget = MaskBudget["global"]
    """Whether weights compete over the whole model, within their tensor or within their module type."""
    structure: MaskStructure = MaskStructure.coordinates
    """Single weights, or whole rows or columns of matrices by the mean of their squared scores."""
    trained: str | None = None
    """rule=delta: the finished run (a run folder or a checkpoint) whose update is taken."""
    like: str | None = None
    """rule=random or magnitude_matched: the mask file whose counts per tensor (and binade) are copied."""
    scores: str | None = None
    """rule=scores: a safetensors file with one score per weight under the weights' names."""
    rank_share: float = knob(0.1, above=0, most=1)
    """rule=safe: singular directions that count as principal, as a share of a matrix's smaller side."""
    steps: int = knob(20, least=1)
    """Rules that watch a run: optimizer steps to watch."""
    exclude: list[str] = knob([])
    """Parameters left out, as patterns of their names: '*norm*', 'model.embed_tokens.weight'."""
    seed: int = knob(0, least=0)
    """Fixes random rules and the order of equal scores."""


@dataclass(kw_only=True, slots=True)
class MaskConfig:
    """Which weights learn: all."""


@dataclass(kw_only=True, slots=True)
class FileMaskConfig(MaskConfig):
    """Those of a mask file."""

    path: str | None = None
    """A mask that was made for student.model, by `opd mask discover` for example."""
    enabled: bool = True
    """false trains every weight, for a comparison with the same recipe."""
    training: MaskTraining = MaskTraining.compact
    """compact holds gradients and optimizer state of kept weights only; restore is the slow reference."""


@dataclass(kw_only=True, slots=True)
class DiscoverMaskConfig(RuleConfig, MaskConfig):
    """Those that a rule finds before training starts; what it needs to see is run first."""

    enabled: bool = True
    """false trains every weight, for a comparison with the same recipe."""
    training: MaskTraining = MaskTraining.compact
    """compact holds gradients and optimizer state of kept weights only; restore is the slow reference."""


@dataclass(kw_only=True, slots=True)
class StudyMaskConfig(DiscoverMaskConfig):
    """The two-stage experiment: train everything, discover, retrain on the mask and on its controls."""

    arms: list[StudyArm] = knob([*StudyArm])
    """What is trained: full first, then the discovered mask and random ones of the same density."""
    seeds: list[int] = knob([0, 1, 2])
    """Every arm is run once for each; they fix samples, prompt order and random masks."""
    lr_scale: float = knob(1.0, above=0)
    """Learning rate of the masked arms as a multiple of optim.lr; sparse masks like a larger one."""
