"""The whole configuration of one run, and the choices of each group."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from opd.config.keeping import (
    EvalConfig,
    RecordConfig,
    RunConfig,
    SaveConfig,
    SyncConfig,
    TrackingConfig,
    WandbConfig,
    WeightRecordConfig,
)
from opd.config.fields import knob
from opd.config.losses import (
    DivergenceLossConfig,
    GrpoLossConfig,
    LossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.config.masks import DiscoverMaskConfig, FileMaskConfig, MaskConfig, StudyMaskConfig
from opd.config.models import (
    AdapterConfig,
    LocalTeacherConfig,
    LoraConfig,
    NoTeacherConfig,
    PoolTeacherConfig,
    SelfTeacherConfig,
    ServerTeacherConfig,
    StudentConfig,
    TeacherConfig,
)
from opd.config.rewards import FunctionRewardConfig, GraderRewardConfig, RewardConfig
from opd.config.training import AdamWConfig, LaunchConfig, OptimConfig, SGDConfig, TrainingConfig
from opd.config.writing import (
    DataConfig,
    DatasetRolloutConfig,
    RolloutConfig,
    ServerRolloutConfig,
    TransformersRolloutConfig,
    VllmRolloutConfig,
)
from opd.types import DivergenceKind


class Method(StrEnum):
    opd = "opd"
    opd_pg = "opd_pg"
    self_distill = "self_distill"
    offline = "offline"
    sft = "sft"
    grpo = "grpo"


@dataclass(kw_only=True, slots=True)
class Config:
    """One run of on-policy distillation."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = knob(0, least=0)
    """Fixes the prompt order and every sample drawn."""
    method: Method = Method.opd
    """Name of a choice of writer, scorer and loss; each of these can still be set by itself."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = MISSING
    rollout: RolloutConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = MISSING
    reward: RewardConfig = MISSING
    optim: OptimConfig = MISSING
    train: TrainingConfig = field(default_factory=TrainingConfig)
    zero: int = knob(1, least=0, most=3)
    """DeepSpeed ZeRO stage: what is sharded over processes (0 nothing, 1 states, 2 gradients, 3 weights)."""
    adapter: AdapterConfig = MISSING
    mask: MaskConfig = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    record: RecordConfig = MISSING
    tracking: TrackingConfig = MISSING
    dry_run: bool = False
    """Check everything that can be checked without training, print the plan, and stop."""


GROUPS: dict[str, dict[str, Any]] = {
    "teacher": {
        "server": ServerTeacherConfig,
        "local": LocalTeacherConfig,
        "pool": PoolTeacherConfig,
        "self": SelfTeacherConfig,
        "none": NoTeacherConfig,
    },
    "rollout": {
        "vllm": VllmRolloutConfig,
        "server": ServerRolloutConfig,
        "transformers": TransformersRolloutConfig,
        "dataset": DatasetRolloutConfig,
    },
    "loss": {
        **{kind.value: DivergenceLossConfig(kind=kind) for kind in DivergenceKind},
        "topk_forward_kl": DivergenceLossConfig(
            kind=DivergenceKind.forward_kl, support=Support.teacher_top_k
        ),
        "topk_reverse_kl": DivergenceLossConfig(
            kind=DivergenceKind.reverse_kl, support=Support.teacher_top_k
        ),
        "policy_gradient": PolicyGradientLossConfig,
        "grpo": GrpoLossConfig,
        "nll": NllLossConfig,
    },
    "reward": {
        "none": RewardConfig,
        "grader": GraderRewardConfig,
        "function": FunctionRewardConfig,
    },
    "optim": {"adamw": AdamWConfig, "sgd": SGDConfig},
    "adapter": {"none": AdapterConfig, "lora": LoraConfig},
    "mask": {
        "none": MaskConfig,
        "file": FileMaskConfig,
        "discover": DiscoverMaskConfig,
        "study": StudyMaskConfig,
    },
    "record": {"none": RecordConfig, "weights": WeightRecordConfig},
    "tracking": {"none": TrackingConfig, "wandb": WandbConfig},
}
"""Group choices: ``loss=jsd`` on the command line picks ``GROUPS["loss"]["jsd"]``."""


def register() -> None:
    """Tell Hydra's ConfigStore the schema and the group choices."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)
