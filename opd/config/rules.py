"""What must hold between settings."""

from opd.config.keeping import WeightRecordConfig
from opd.config.fields import broken_bounds
from opd.config.losses import (
    DivergenceLossConfig,
    GrpoLossConfig,
    NllLossConfig,
    PolicyGradientLossConfig,
    Support,
)
from opd.config.masks import DiscoverMaskConfig, FileMaskConfig
from opd.config.models import (
    DType,
    LocalTeacherConfig,
    LoraConfig,
    NoTeacherConfig,
    PoolTeacherConfig,
    SelfTeacher,
    SelfTeacherConfig,
    ServedTeacherConfig,
    ServerTeacherConfig,
)
from opd.config.rewards import MeasuredRewardConfig
from opd.config.schema import Config
from opd.config.training import AdamWConfig, Precision, SGDConfig, TrainingEngine, Watched
from opd.config.writing import DatasetRolloutConfig
from opd.types import Correction, Surrogate, Weighting


def problems(config: Config) -> list[str]:
    """Every broken bound and rule, one sentence each; empty when the config is sound."""
    found = [*broken_bounds(config)]
    for rule in RULES:
        sentence = rule(config)
        if sentence is not None:
            found.append(sentence)
    return found


def a_teacher_is_named(config: Config) -> str | None:
    """Somebody must score what the loss asks about."""
    if not asks_a_teacher(config):
        return None
    match config.teacher:
        case NoTeacherConfig():
            return (
                "teacher=none, and this loss needs one: use teacher=local or server with "
                "teacher.model, teacher=self, or a loss that asks nobody (nll, grpo)"
            )
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


def asks_a_teacher(config: Config) -> bool:
    """Whether the loss cannot do without a teacher's log-probs."""
    match config.loss:
        case NllLossConfig() | GrpoLossConfig(kl=0.0):
            return False
    return True


def has_teacher(config: Config) -> bool:
    """Whether anybody scores, be it for the examination alone."""
    match config.teacher:
        case NoTeacherConfig():
            return False
        case SelfTeacherConfig():
            return True
        case ServerTeacherConfig(url=url, model=model):
            return (url or model) is not None
        case PoolTeacherConfig(members=members):
            return bool(members)
    return config.teacher.model is not None


def last_step(config: Config) -> int:
    """The step after which this call of the run ends."""
    return min(config.train.steps, config.train.stop_after or config.train.steps)


def an_average_is_float32(config: Config) -> str | None:
    """bfloat16 rounds steps of a hundredth of a weight away."""
    teacher = config.teacher
    if (
        isinstance(teacher, SelfTeacherConfig)
        and teacher.weights == SelfTeacher.ema
        and teacher.dtype == DType.bfloat16
    ):
        return (
            "teacher.weights=ema with teacher.dtype=bfloat16 would round its small steps away and "
            "never move: use teacher.dtype=float32 (auto)"
        )
    return None


def a_data_set_that_writes_has_completions(config: Config) -> str | None:
    """What the student does not write must be read somewhere."""
    if config.rollout.on_policy < 1 and config.data.completion_field is None:
        return (
            f"rollout.on_policy={config.rollout.on_policy:g} reads completions from data.train: name "
            "their column with data.completion_field (`opd write` makes such a file)"
        )
    return None


def what_is_read_can_be_learned_from(config: Config) -> str | None:
    """Some losses are about tokens that the student itself drew."""
    if config.rollout.on_policy == 1:
        return None
    found = f"rollout.on_policy={config.rollout.on_policy:g}"
    if isinstance(config.loss, PolicyGradientLossConfig | GrpoLossConfig):
        return (
            f"{found} and a policy gradient, which is about tokens that the student drew: use "
            "rollout.on_policy=1, or a divergence"
        )
    if isinstance(config.loss, DivergenceLossConfig) and config.loss.support in (
        Support.student_top_k,
        Support.union,
        Support.intersection,
    ):
        return (
            f"{found} and loss.support={config.loss.support}, whose ids the engine names as it "
            "writes: use loss.support=full or teacher_top_k"
        )
    return None


def a_data_set_answers_no_questions(config: Config) -> str | None:
    """Examinations need an engine."""
    if isinstance(config.rollout, DatasetRolloutConfig) and config.data.eval is not None:
        return (
            "rollout=dataset has no engine to examine data.eval with: use data.eval=null, or "
            "rollout=vllm with rollout.on_policy=0"
        )
    return None


def rewards_are_compared_in_groups(config: Config) -> str | None:
    """A group of one has no spread."""
    if isinstance(config.reward, MeasuredRewardConfig) and config.rollout.n < 2:
        return (
            f"reward=... compares the completions of a prompt with each other, found "
            f"rollout.n={config.rollout.n}: use 2 or more"
        )
    return None


def adapters_switched_off_are_whole(config: Config) -> str | None:
    """ZeRO-3 keeps no whole weight to switch adapters off on."""
    if (
        isinstance(config.teacher, SelfTeacherConfig)
        and config.teacher.weights == SelfTeacher.frozen
        and isinstance(config.adapter, LoraConfig)
        and config.zero == 3
        and config.launch.engine == TrainingEngine.deepspeed
    ):
        return (
            "teacher=self with adapter=lora reads the student's weights with adapters off, and zero=3 "
            "shards them: use zero=2, or teacher=local teacher.model=<the student>"
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


def a_weighting_has_what_it_weighs_by(config: Config) -> str | None:
    """A loss that never sees the teacher cannot weigh by the teacher."""
    found = config.loss.weighting
    match config.loss:
        case NllLossConfig() | GrpoLossConfig(kl=0.0):
            refused, sees = (Weighting.teacher_entropy, Weighting.gap), "asks no teacher"
        case PolicyGradientLossConfig() | GrpoLossConfig():
            refused, sees = (Weighting.teacher_entropy,), "asks the teacher for sampled tokens only"
        case _:
            return None
    if found in refused:
        return (
            f"loss.weighting={found} does not go with a loss that {sees}: use a divergence, or "
            f"loss.weighting={' or '.join(w for w in Weighting if w not in refused)}"
        )
    return None


def engines_are_corrected_for_once(config: Config) -> str | None:
    """PPO's ratio is an importance weight already."""
    corrected = config.loss.correction != Correction.none
    match config.loss:
        case (
            PolicyGradientLossConfig(surrogate=Surrogate.clip)
            | GrpoLossConfig(surrogate=Surrogate.clip)
        ) if corrected:
            return (
                f"loss.correction={config.loss.correction} corrects a second time for the engine that "
                "loss.surrogate=clip divides by: use loss.surrogate=plain with a correction"
            )
    return None


def advantages_need_a_reward(config: Config) -> str | None:
    """Somebody must say which completion was better."""
    if isinstance(config.reward, MeasuredRewardConfig):
        return None
    if isinstance(config.loss, GrpoLossConfig):
        return "loss=grpo learns from rewards alone: use reward=grader or reward=function"
    if config.loss.reward_weight:
        return (
            f"loss.reward_weight={config.loss.reward_weight:g} needs a reward: use reward=grader or "
            "reward=function"
        )
    return None


RULES = (
    a_data_set_that_writes_has_completions,
    what_is_read_can_be_learned_from,
    a_data_set_answers_no_questions,
    rewards_are_compared_in_groups,
    adapters_switched_off_are_whole,
    an_average_is_float32,
    a_weighting_has_what_it_weighs_by,
    advantages_need_a_reward,
    engines_are_corrected_for_once,
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
