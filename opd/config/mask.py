"""``mask``: which weights are trained, and how a mask is discovered."""

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING

from opd.config.adapter import LoraConfig
from opd.config.fields import bounded
from opd.config.launch import LaunchEngine
from opd.config.optim import AdamWConfig
from opd.config.train import MaskScores

if TYPE_CHECKING:
    from opd.config.schema import Config


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
    function = "function"


class MaskBudget(StrEnum):
    vars()["global"] = "global"  # a keyword of Python, and Hydra reads names
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


@dataclass(kw_only=True, slots=True)
class RuleConfig:
    """How a mask is discovered."""

    rule: MaskRule = MaskRule.delta
    """How weights are ranked; docs/masks.md explains each rule."""
    density: float | None = bounded(None, above=0, most=1)
    """Share of all weights to keep, met exactly; some rules take a threshold instead."""
    threshold: float | None = bounded(None, least=0)
    """Keep scores above this instead of an exact share; rule=delta scores |D| in bf16."""
    budget: MaskBudget = MaskBudget["global"]
    """Whether weights compete over the whole model, within their tensor or within their module type."""
    structure: MaskStructure = MaskStructure.coordinates
    """Single weights, or whole rows or columns of matrices by the mean of their squared scores."""
    trained: str | None = None
    """rule=delta: the finished run (a run folder or a checkpoint) whose update is scored."""
    like: str | None = None
    """rule=random or magnitude_matched: the mask file whose counts per tensor (and binade) are copied."""
    scores: str | None = None
    """rule=scores: a safetensors file with one score per weight under the weights' names."""
    function: str | None = None
    """rule=function: path.py:name or module:name of a function (name, weight) -> scores of its shape."""
    rank_share: float = bounded(0.1, above=0, most=1)
    """rule=safe: singular directions that count as principal, as a share of a matrix's smaller side."""
    steps: int = bounded(20, least=1)
    """Rules that score a live run: optimizer steps to run."""
    exclude: list[str] = bounded([])
    """Parameters that are not trained, as name patterns: '*norm*', 'model.embed_tokens.weight'."""
    seed: int = bounded(0, least=0)
    """Fixes random rules and the tie-breaks of equal scores."""


@dataclass(kw_only=True, slots=True)
class MaskConfig:
    """No mask: every weight is trained."""


@dataclass(kw_only=True, slots=True)
class FileMaskConfig(MaskConfig):
    """The weights of a mask file are trained."""

    path: str | None = None
    """A mask of student.model, made by `opd mask discover` for example."""
    enabled: bool = True
    """false trains every weight, for a comparison with the same recipe."""
    training: MaskTraining = MaskTraining.compact
    """compact holds gradients and optimizer state of kept weights only; restore is the slow reference."""


@dataclass(kw_only=True, slots=True)
class DiscoverMaskConfig(RuleConfig, MaskConfig):
    """A mask is discovered by a rule before training starts; the run that a rule needs is done first."""

    enabled: bool = True
    """false trains every weight, for a comparison with the same recipe."""
    training: MaskTraining = MaskTraining.compact
    """compact holds gradients and optimizer state of kept weights only; restore is the slow reference."""

    def rule_config(self) -> RuleConfig:
        """The rule's own settings."""
        return RuleConfig(**{f.name: getattr(self, f.name) for f in fields(RuleConfig)})


@dataclass(kw_only=True, slots=True)
class StudyMaskConfig(DiscoverMaskConfig):
    """The two-stage experiment: train everything, discover, retrain on the mask and on its controls."""

    arms: list[StudyArm] = bounded([*StudyArm])
    """What is trained: everything first, then the discovered mask and random masks of its density."""
    seeds: list[int] = bounded([0, 1, 2])
    """Every arm runs once per seed, which fixes samples, prompt order and random masks."""
    lr_scale: float = bounded(1.0, above=0)
    """Learning rate of the masked arms as a multiple of optim.lr; sparse masks need a larger one."""


CHOICES = {
    "none": MaskConfig,
    "file": FileMaskConfig,
    "discover": DiscoverMaskConfig,
    "study": StudyMaskConfig,
}


def active_mask(config: "Config") -> FileMaskConfig | DiscoverMaskConfig | None:
    """The mask that this run is trained with, or None."""
    if isinstance(config.mask, FileMaskConfig | DiscoverMaskConfig) and config.mask.enabled:
        return config.mask
    return None


def a_mask_is_of_the_student_s_own_weights(config: "Config") -> str | None:
    """A mask lists indices of the student's own weights; adapters are other weights."""
    if active_mask(config) is not None and isinstance(config.adapter, LoraConfig):
        return (
            "mask=... trains some of the student's own weights and adapter=lora freezes them: "
            "use adapter=none with a mask, or mask=none with adapters"
        )
    return None


def a_mask_file_is_named(config: "Config") -> str | None:
    """mask=file needs a file."""
    if isinstance(config.mask, FileMaskConfig) and config.mask.enabled and not config.mask.path:
        return "mask=file needs mask.path=MASK: make one with `opd mask discover`"
    return None


def a_scored_run_has_dense_states(config: "Config") -> str | None:
    """Scores need the optimizer's state of every weight."""
    scores = config.train.mask_scores
    if scores == MaskScores.none:
        return None
    if active_mask(config) is not None or isinstance(config.adapter, LoraConfig):
        return f"train.mask_scores={scores} scores every weight: use mask=none and adapter=none"
    if scores == MaskScores.adam_saliency and not isinstance(config.optim, AdamWConfig):
        return "train.mask_scores=adam_saliency reads AdamW's moments: use optim=adamw"
    if config.zero == 0 and config.launch.engine == LaunchEngine.deepspeed:
        return f"train.mask_scores={scores} needs zero=1, 2 or 3, found zero=0"
    return None


RULES = (
    a_mask_file_is_named,
    a_mask_is_of_the_student_s_own_weights,
    a_scored_run_has_dense_states,
)

LIVE_RULES = (
    MaskRule.early_delta,
    MaskRule.adam_saliency,
    MaskRule.fisher,
    MaskRule.first_gradient,
)
"""Rules whose scores come from a short run of training."""
COMPETITION = {"density", "budget", "structure", "exclude"}
READS: dict[MaskRule, set[str]] = {
    MaskRule.delta: COMPETITION | {"threshold", "trained"},
    MaskRule.near_zero: COMPETITION,
    MaskRule.safe: COMPETITION | {"rank_share"},
    MaskRule.random: COMPETITION | {"like"},
    MaskRule.magnitude_matched: {"like"},
    MaskRule.scores: COMPETITION | {"threshold", "scores"},
    MaskRule.function: COMPETITION | {"threshold", "function"},
    **{rule: COMPETITION | {"threshold", "scores", "steps"} for rule in LIVE_RULES},
}
"""Settings that each rule reads, besides rule and seed."""
NEEDS = {
    MaskRule.delta: "trained",
    MaskRule.magnitude_matched: "like",
    MaskRule.scores: "scores",
    MaskRule.function: "function",
    **dict.fromkeys(LIVE_RULES, "scores"),
}


def require_valid_rule(rule: RuleConfig) -> None:
    """ValueError for settings that are missing, contradict each other or have no effect."""
    defaults = RuleConfig(rule=rule.rule)
    for field in fields(RuleConfig):
        if field.name in {"rule", "seed", *READS[rule.rule]}:
            continue
        if getattr(rule, field.name) != getattr(defaults, field.name):
            raise ValueError(
                f"{field.name}={_text(getattr(rule, field.name))} has no effect with rule={rule.rule}, "
                f"which reads {', '.join(sorted(READS[rule.rule]))} and seed: leave it out"
            )
    needed = NEEDS.get(rule.rule)
    if needed is not None and getattr(rule, needed) is None:
        raise ValueError(f"rule={rule.rule} needs {needed}=..., found none")
    if rule.like is not None:
        for name in sorted(COMPETITION):
            if getattr(rule, name) != getattr(defaults, name):
                raise ValueError(
                    f"{name}={_text(getattr(rule, name))} has no effect beside like={rule.like}, whose "
                    "counts are copied: leave one of them out"
                )
        return
    _require_size(rule, defaults)


def _require_size(rule: RuleConfig, defaults: RuleConfig) -> None:
    if (rule.density is None) == (rule.threshold is None):
        found = "none" if rule.density is None else "both"
        needs = "density=... or threshold=..." if "threshold" in READS[rule.rule] else "density=..."
        needs += " or like=..." if "like" in READS[rule.rule] else ""
        raise ValueError(f"rule={rule.rule} needs {needs}, found {found}")
    if rule.threshold is not None:
        for name in ("budget", "structure"):
            if getattr(rule, name) != getattr(defaults, name):
                raise ValueError(
                    f"{name}={getattr(rule, name)} needs density=..., found threshold={rule.threshold}"
                )


def _text(value: object) -> str:
    return str(getattr(value, "value", value))
