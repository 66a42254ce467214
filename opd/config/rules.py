"""What must hold between settings."""

from opd.config.keeping import WeightRecordConfig
from opd.config.knobs import broken_bounds
from opd.config.masks import DiscoverMaskConfig, FileMaskConfig
from opd.config.models import (
    LocalTeacherConfig,
    LoraConfig,
    PoolTeacherConfig,
    ServedTeacherConfig,
    ServerTeacherConfig,
)
from opd.config.schema import Config
from opd.config.training import AdamWConfig, Precision, SGDConfig, TrainingEngine, Watched


def problems(config: Config) -> list[str]:
    """Every broken bound and rule, one sentence each; empty when the config is sound."""
    found = [*broken_bounds(config)]
    for rule in RULES:
        sentence = rule(config)
        if sentence is not None:
            found.append(sentence)
    return found


def a_teacher_is_named(config: Config) -> str | None:
    """Somebody must score."""
    match config.teacher:
        case ServerTeacherConfig(model=None, url=None):
            return "teacher=server needs teacher.model (a server is started) or teacher.url (one is used)"
        case LocalTeacherConfig(model=None):
            return "teacher=local needs teacher.model=<folder or hub id>"
        case PoolTeacherConfig(members=members) if not members:
            return (
                "teacher=pool needs at least one member: teacher.members: {NAME: model or url} in the "
                "recipe, or +teacher.members.NAME=MODEL"
            )
        case PoolTeacherConfig(model=str(model)):
            return (
                f"teacher=pool reads teacher.members, found teacher.model={model}: make it a member, "
                "or use teacher=server"
            )
    return None


def torch_engine_is_one_process(config: Config) -> str | None:
    """Only DeepSpeed talks between processes."""
    if config.launch.engine == TrainingEngine.torch and config.launch.processes > 1:
        return (
            f"launch.engine=torch runs one process, found launch.processes={config.launch.processes}: "
            "use launch.engine=deepspeed"
        )
    return None


def momentum_is_needed_for_nesterov(config: Config) -> str | None:
    """torch refuses Nesterov without momentum."""
    if isinstance(config.optim, SGDConfig) and config.optim.nesterov and not config.optim.momentum:
        return "optim.nesterov=true needs optim.momentum above 0"
    return None


def warmup_ends_before_training(config: Config) -> str | None:
    """A learning rate that never arrives is a mistake."""
    if config.train.steps and config.optim.warmup_steps > config.train.steps:
        return (
            f"optim.warmup_steps={config.optim.warmup_steps} is longer than "
            f"train.steps={config.train.steps}: shorten the warm-up"
        )
    return None


def every_process_gets_a_prompt(config: Config) -> str | None:
    """Ranks learn together or not at all."""
    if config.train.prompts_per_step < config.launch.processes:
        return (
            f"train.prompts_per_step={config.train.prompts_per_step} is fewer than "
            f"launch.processes={config.launch.processes}: give every process a prompt"
        )
    return None


def betas_are_two(config: Config) -> str | None:
    """AdamW has two moments."""
    if isinstance(config.optim, AdamWConfig):
        betas = config.optim.betas
        if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            return f"optim.betas={list(betas)}: allowed are two numbers of at least 0 and below 1"
    return None


def server_backend_is_known(config: Config) -> str | None:
    """Two engines can serve a teacher."""
    if isinstance(config.teacher, ServedTeacherConfig) and config.teacher.backend not in (
        "vllm",
        "torch",
    ):
        return f"teacher.backend={config.teacher.backend}: allowed are vllm and torch"
    return None


def pure_bf16_has_a_stage(config: Config) -> str | None:
    """DeepSpeed keeps bf16 states in stages 1 to 3 only."""
    if (
        config.train.precision == Precision.pure_bf16
        and config.launch.engine == TrainingEngine.deepspeed
        and config.zero == 0
    ):
        return "train.precision=pure_bf16 needs zero=1, 2 or 3, found zero=0"
    return None


def active_mask(config: Config) -> FileMaskConfig | DiscoverMaskConfig | None:
    """The mask that confines this run, if one does."""
    if isinstance(config.mask, FileMaskConfig | DiscoverMaskConfig) and config.mask.enabled:
        return config.mask
    return None


def a_mask_is_of_the_weights_themselves(config: Config) -> str | None:
    """A mask lists coordinates of the student's own weights, adapters have none of them."""
    if active_mask(config) is not None and isinstance(config.adapter, LoraConfig):
        return (
            "mask=... trains coordinates of the student's own weights and adapter=lora freezes them: "
            "use adapter=none with a mask, or mask=none with adapters"
        )
    return None


def a_mask_file_is_named(config: Config) -> str | None:
    """Something must say which weights are kept."""
    if isinstance(config.mask, FileMaskConfig) and config.mask.enabled and not config.mask.path:
        return "mask=file needs mask.path=MASK: make one with `opd mask discover`"
    return None


def a_watched_run_has_dense_states(config: Config) -> str | None:
    """Scores are read off the optimizer's state of every weight."""
    if config.train.scores == Watched.none:
        return None
    if active_mask(config) is not None or isinstance(config.adapter, LoraConfig):
        return f"train.scores={config.train.scores} watches every weight: use mask=none and adapter=none"
    if config.train.scores == Watched.adam_saliency and not isinstance(config.optim, AdamWConfig):
        return "train.scores=adam_saliency reads AdamW's moments: use optim=adamw"
    if config.zero == 0 and config.launch.engine == TrainingEngine.deepspeed:
        return f"train.scores={config.train.scores} needs zero=1, 2 or 3, found zero=0"
    return None


def a_recorded_run_has_masters(config: Config) -> str | None:
    """The record reads masters and moments of the student's own weights."""
    if not isinstance(config.record, WeightRecordConfig):
        return None
    if isinstance(config.adapter, LoraConfig):
        return (
            "record=weights reads the student's own weights and adapter=lora freezes them: use "
            "adapter=none, or record=none"
        )
    if config.zero == 0 and config.launch.engine == TrainingEngine.deepspeed:
        return "record=weights needs zero=1, 2 or 3 (or launch.engine=torch), found zero=0"
    return None


RULES = (
    a_recorded_run_has_masters,
    a_mask_file_is_named,
    a_mask_is_of_the_weights_themselves,
    a_watched_run_has_dense_states,
    pure_bf16_has_a_stage,
    a_teacher_is_named,
    torch_engine_is_one_process,
    momentum_is_needed_for_nesterov,
    warmup_ends_before_training,
    every_process_gets_a_prompt,
    betas_are_two,
    server_backend_is_known,
)
