"""The configuration of a run, the choices of each group, and the rules between settings."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from opd.config import (
    adapter,
    eval,
    launch,
    loss,
    mask,
    optim,
    record,
    reward,
    rollout,
    run,
    save,
    schedule,
    sources,
    teacher,
    tracking,
    uld,
)
from opd.config.adapter import AdapterConfig
from opd.config.data import DataConfig
from opd.config.eval import EvalConfig
from opd.config.fields import bounded, broken_bounds
from opd.config.launch import LaunchConfig
from opd.config.loss import LossConfig
from opd.config.mask import MaskConfig
from opd.config.method import Method
from opd.config.optim import OptimConfig
from opd.config.record import RecordConfig
from opd.config.reward import RewardConfig
from opd.config.rollout import RolloutConfig
from opd.config.run import RunConfig
from opd.config.save import SaveConfig
from opd.config.schedule import ScheduleConfig
from opd.config.student import StudentConfig
from opd.config.sync import SyncConfig
from opd.config.teacher import TeacherConfig
from opd.config.tracking import TrackingConfig
from opd.config.train import TrainConfig


@dataclass(kw_only=True, slots=True)
class Config:
    """One run of on-policy distillation."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = bounded(0, least=0)
    """Seed of the prompt order and of every sample."""
    method: Method = Method.opd
    """A named choice of rollout, teacher and loss; each of these can also be set separately."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = MISSING
    rollout: RolloutConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = MISSING
    reward: RewardConfig = MISSING
    optim: OptimConfig = MISSING
    train: TrainConfig = field(default_factory=TrainConfig)
    zero: int = bounded(1, least=0, most=3)
    """DeepSpeed ZeRO stage: what is sharded over processes (0 nothing, 1 states, 2 gradients, 3 weights)."""
    adapter: AdapterConfig = MISSING
    mask: MaskConfig = MISSING
    eval: EvalConfig = field(default_factory=EvalConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    schedule: ScheduleConfig = MISSING
    record: RecordConfig = MISSING
    tracking: TrackingConfig = MISSING
    profile: bool = False
    """Write trace.json, the spans of every process, for chrome://tracing or ui.perfetto.dev."""
    dry_run: bool = False
    """Check all that can be checked without training, print the plan, write dry_run.yaml, and stop."""


GROUPS: dict[str, dict[str, Any]] = {
    "teacher": teacher.CHOICES,
    "rollout": rollout.CHOICES,
    "loss": {**loss.CHOICES, **uld.CHOICES},
    "reward": reward.CHOICES,
    "optim": optim.CHOICES,
    "adapter": adapter.CHOICES,
    "mask": mask.CHOICES,
    "schedule": schedule.CHOICES,
    "record": record.CHOICES,
    "tracking": tracking.CHOICES,
}
"""Group choices: ``loss=jsd`` on the command line picks ``GROUPS["loss"]["jsd"]``."""

RULES = (
    *run.RULES,
    *save.RULES,
    *sources.RULES,
    *adapter.RULES,
    *loss.RULES,
    *uld.RULES,
    *eval.RULES,
    *rollout.RULES,
    *teacher.RULES,
    *record.RULES,
    *schedule.RULES,
    *mask.RULES,
    *launch.RULES,
    *optim.RULES,
)
"""Rules between settings: each returns a sentence when it is broken, otherwise None."""

FORMER_NAMES = {
    "adapter.alpha": "adapter.lora_alpha",
    "adapter.dropout": "adapter.lora_dropout",
    "adapter.rank": "adapter.r",
    "adapter.targets": "adapter.target_modules",
    "loss.band_high": "loss.correction_max",
    "loss.band_low": "loss.correction_min",
    "loss.cap": "loss.correction_cap",
    "loss.clip": "loss.token_clip",
    "loss.clip_high": "loss.clip_ratio_high",
    "loss.clip_low": "loss.clip_ratio_low",
    "loss.first_share": "loss.prefix_fraction",
    "loss.kl": "loss.kl_coef",
    "loss.normalise": "loss.reduction",
    "optim.clip": "optim.max_grad_norm",
    "reward.scale": "reward.scale_rewards",
    "rollout.eager": "rollout.enforce_eager",
    "rollout.gpu_memory_fraction": "rollout.gpu_memory_utilization",
    "rollout.kv_cache_mib": "rollout.kv_cache_memory_bytes",
    "rollout.max_length": "rollout.max_model_len",
    "rollout.sleep": "rollout.enable_sleep_mode",
    "student.attention": "student.attn_implementation",
    "sync.anchor_every": "sync.snapshot_every",
    "teacher.batch_tokens": "teacher.max_num_batched_tokens",
    "teacher.decay": "teacher.ema_decay",
    "teacher.gpu_memory_fraction": "teacher.gpu_memory_utilization",
    "teacher.max_length": "teacher.max_model_len",
    "teacher.tensor_parallel": "teacher.tensor_parallel_size",
    "train.activation_checkpointing": "train.gradient_checkpointing",
    "train.micro_tokens": "train.max_tokens_per_micro_batch",
    "train.scores": "train.mask_scores",
}
"""Settings that were renamed, former -> present name; a former name is refused with the present one."""


def problems(config: Config) -> list[str]:
    """Every broken bound and rule, one sentence each; empty when the config is valid."""
    found = [*broken_bounds(config)]
    for rule in RULES:
        sentence = rule(config)
        if sentence is not None:
            found.append(sentence)
    return found


def register() -> None:
    """Register the schema and the group choices in Hydra's ConfigStore."""
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name="opd_schema", node=Config)
    for group, choices in GROUPS.items():
        for name, node in choices.items():
            store.store(group=group, name=name, node=node)
