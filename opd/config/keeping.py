"""What is examined, saved, handed over, recorded and told."""

from dataclasses import dataclass
from enum import StrEnum

from opd.config.fields import knob


class Resume(StrEnum):
    auto = "auto"
    never = "never"


class GraderKind(StrEnum):
    exact = "exact"
    after = "after"
    contains = "contains"
    number = "number"
    math = "math"


class WandbMode(StrEnum):
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Where the run lives."""

    name: str = "run"
    """Name of the run; a recipe sets it to its own."""
    dir: str | None = None
    """Folder of the run; by default runs/<name>, and in a sweep runs/<name>/<overrides>."""
    resume: Resume = Resume.auto
    """auto goes on from the newest checkpoint in run.dir; never refuses a folder that has one."""


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """The examination."""

    task: str = "heldout"
    """Name in the metrics: eval/<task>/accuracy."""
    every: int = knob(50, least=0)
    """Steps between evaluations; 0 only before and after. Both of these always happen."""
    grader: GraderKind = GraderKind.exact
    """How a completion is compared with the answer."""
    marker: str = "#"
    """grader=after: the answer is what follows the last marker."""
    max_tokens: int | None = knob(None, least=1)
    """Longest completion; by default rollout.max_tokens."""
    k: int = knob(0, least=0)
    """Samples per prompt for mean@k; 0 is greedy accuracy alone."""
    temperature: float = knob(1.0, above=0)
    """Temperature of those samples."""
    kl_prompts: int = knob(64, least=0)
    """Held-out prompts on which the exact reverse KL to the teacher is measured; 0 is none."""
    kl_data: str | None = None
    """Prompts for that measurement when they are not data.eval; the same kinds of file."""
    samples: int = knob(4, least=0)
    """Transcripts kept from each evaluation."""
    teacher_accuracy: bool = True
    """Examine the teacher too, once, when teacher.model is known."""


@dataclass(kw_only=True, slots=True)
class SaveConfig:
    """What is kept."""

    every: int = knob(50, least=0)
    """Steps between checkpoints; 0 keeps none but the last."""
    keep: int = knob(2, least=1)
    """How many of the newest checkpoints stay."""


@dataclass(kw_only=True, slots=True)
class SyncConfig:
    """The learner's weights into the rollout engine, after every step."""

    verify_every: int = knob(25, least=0)
    """Steps between comparisons of the engine's log-probs with the learner's; 0 only at the start."""
    max_gap: float | None = knob(None, above=0)
    """Largest mean difference in nats before the run stops; by default 1e-3 in fp32, 0.15 in bf16."""
    anchor_every: int = knob(50, least=1)
    """rollout=server: every so many pushes all weights travel, else only the changed ones."""


@dataclass(kw_only=True, slots=True)
class RecordConfig:
    """What is measured in the weights while they are trained: nothing."""


@dataclass(kw_only=True, slots=True)
class WeightRecordConfig(RecordConfig):
    """How far the weights have moved from where they started, in weights.jsonl."""

    every: int = knob(10, least=1)
    """Steps between recordings; the start and the last step are always recorded."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Who else is told: nobody."""


@dataclass(kw_only=True, slots=True)
class WandbConfig(TrackingConfig):
    """Weights & Biases."""

    project: str = "opd"
    """Project name."""
    mode: WandbMode = WandbMode.online
    """offline writes into the run folder and needs no network."""
