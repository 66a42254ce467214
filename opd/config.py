"""Every knob: its type, its default, its bounds, and one sentence under it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from opd.types import DivergenceKind, Importance


def knob(
    default: Any = MISSING,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field with bounds: ``least`` <= value <= ``most``, ``above`` < value < ``below``."""
    bounds = {"least": least, "above": above, "most": most, "below": below}
    metadata = {name: bound for name, bound in bounds.items() if bound is not None}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class Resume(StrEnum):
    auto = "auto"
    never = "never"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    pure_bf16 = "pure_bf16"


class Support(StrEnum):
    full = "full"
    teacher_top_k = "teacher_top_k"
    student_top_k = "student_top_k"
    union = "union"


class LearningRateSchedule(StrEnum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class GraderKind(StrEnum):
    exact = "exact"
    after = "after"
    contains = "contains"
    number = "number"
    math = "math"


class TrainingEngine(StrEnum):
    deepspeed = "deepspeed"
    torch = "torch"


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


class Watched(StrEnum):
    none = "none"
    early_delta = "early_delta"
    adam_saliency = "adam_saliency"
    fisher = "fisher"
    first_gradient = "first_gradient"


class MaskTraining(StrEnum):
    compact = "compact"
    restore = "restore"


class Others(StrEnum):
    refuse = "refuse"
    drop = "drop"


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
class StudentConfig:
    """The model that writes and learns."""

    model: str = MISSING
    """Folder or hub id of a causal language model."""
    trust_remote_code: bool = False
    """Run code that comes with the model; off unless you ask for it."""
    attention: str = "sdpa"
    """Attention implementation of transformers: sdpa, eager, flash_attention_2."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """The model that scores."""

    model: str | None = None
    """Folder or hub id of the teacher."""
    dtype: DType = DType.auto
    """Number format of the teacher's weights; auto is the checkpoint's own."""
    max_length: int | None = knob(None, least=2)
    """Longest prompt plus completion the teacher takes; by default what its config says."""


@dataclass(kw_only=True, slots=True)
class ServerTeacherConfig(TeacherConfig):
    """A vLLM teacher behind HTTP: started with the run, or found at teacher.url."""

    url: str | None = None
    """Address of a running `opd teacher`; without it the run starts one from teacher.model."""
    timeout: float = knob(300.0, above=0)
    """Seconds before one request is given up and tried again."""
    retries: int = knob(4, least=0)
    """How often a failed request is tried again, with exponential back-off."""
    gpu_memory_fraction: float = knob(0.45, above=0, most=1)
    """Share of each GPU's memory that a server started with the run may use."""
    tensor_parallel: int = knob(1, least=1)
    """GPUs over which a server started with the run splits the teacher."""
    devices: str | None = None
    """CUDA_VISIBLE_DEVICES of a server started with the run; by default the run's own."""
    backend: str = "vllm"
    """Engine of a server started with the run: vllm, or torch where there is no vLLM."""


@dataclass(kw_only=True, slots=True)
class LocalTeacherConfig(TeacherConfig):
    """A Hugging Face teacher inside each training process."""

    batch_tokens: int = knob(8192, least=1)
    """Padded tokens in one forward pass of the teacher."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """Who writes, and how."""

    n: int = knob(1, least=1)
    """Completions per prompt."""
    temperature: float = knob(1.0, above=0)
    """Sampling temperature; learner and teacher are scored at the same one."""
    top_p: float = knob(1.0, above=0, most=1)
    """Nucleus sampling; below 1 the learner cannot reproduce the engine's log-probs exactly."""
    top_k: int = -1
    """Sample among the k likeliest tokens only; -1 is all of them."""
    max_tokens: int = knob(256, least=1)
    """Longest completion, in tokens."""
    dtype: DType = DType.auto
    """Number format of the engine's weights; auto is the learner's compute precision."""


@dataclass(kw_only=True, slots=True)
class VllmRolloutConfig(RolloutConfig):
    """A vLLM engine inside each training process."""

    gpu_memory_fraction: float = knob(0.35, above=0, most=1)
    """Share of the GPU's memory that the engine may use."""
    kv_cache_mib: int | None = knob(None, least=1)
    """Size of the key-value cache in MiB; by default what the fraction leaves, on CPU 512."""
    max_length: int | None = knob(None, least=2)
    """Longest prompt plus completion; by default what data and rollout.max_tokens need."""
    eager: bool | None = None
    """Skip graph capture; by default true on CPU and false on CUDA."""
    sleep: bool = True
    """On CUDA, free the engine's memory while the learner works."""


@dataclass(kw_only=True, slots=True)
class ServerRolloutConfig(VllmRolloutConfig):
    """vLLM engines in processes of their own, behind HTTP; only changed weights travel."""

    urls: list[str] = knob([])
    """Addresses of running `opd rollout`; without them the run starts rollout.servers of them."""
    servers: int = knob(1, least=1)
    """How many to start with the run; rank r sends its prompts to server r modulo their number."""
    devices: str | None = None
    """GPUs of the servers started with the run, comma separated, one each; by default the run's own."""
    timeout: float = knob(600.0, above=0)
    """Seconds before one request, a whole generation included, is given up and tried again."""
    retries: int = knob(8, least=0)
    """How often a failed request is tried again, with exponential back-off; 8 are about 90 seconds."""


@dataclass(kw_only=True, slots=True)
class TransformersRolloutConfig(RolloutConfig):
    """model.generate() of transformers, for machines without vLLM."""

    batch_size: int = knob(64, least=1)
    """Sequences generated at once."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Prompts to learn from and prompts to be examined on."""

    train: str = MISSING
    """Training prompts: a .jsonl, .json, .csv or .parquet file, or a hub data set id."""
    eval: str | None = None
    """Held-out prompts with answers, of the same kinds; without them nothing is evaluated."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of data.train when it is a hub data set."""
    eval_subset: str | None = None
    """Configuration name of data.eval; by default data.subset."""
    eval_split: str = "test"
    """Split of data.eval when it is a hub data set."""
    prompt_field: str = "prompt"
    """Column that holds the prompt: a string, or a list of {role, content} messages."""
    answer_field: str = "answer"
    """Column that holds the answer that graders compare with."""
    eval_prompt_field: str | None = None
    """The same for data.eval; by default data.prompt_field."""
    eval_answer_field: str | None = None
    """The same for data.eval; by default data.answer_field."""
    answer_regex: str | None = None
    """Regular expression whose first group is the answer, for example '#### (.*)' on GSM8K."""
    template: str | None = None
    """Text around a string prompt, with {prompt} in it."""
    chat: bool = False
    """Put string prompts into the tokenizer's chat template as the user's turn."""
    system: str | None = None
    """System message, when the chat template is used."""
    limit: int | None = knob(None, least=1)
    """Use only the first so many training prompts."""
    eval_limit: int | None = knob(None, least=1)
    """Use only the first so many held-out prompts."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """What the student minimises."""


@dataclass(kw_only=True, slots=True)
class DivergenceLossConfig(LossConfig):
    """GKD style: a divergence between the two distributions at every token."""

    kind: DivergenceKind = DivergenceKind.reverse_kl
    """Which divergence."""
    support: Support = Support.full
    """The whole vocabulary, or k ids (the teacher's, the student's, both) and a tail bucket."""
    k: int = knob(32, least=1)
    """Size of a truncated support."""
    beta: float = knob(0.5, least=0, most=1)
    """Weight of the teacher in the mixture of jsd; 0 is forward and 1 is reverse KL."""
    skew: float = knob(0.1, least=0, below=1)
    """Share of the first distribution mixed into the second one by the skewed divergences."""


@dataclass(kw_only=True, slots=True)
class PolicyGradientLossConfig(LossConfig):
    """Sampled-token reverse KL as a per-token advantage."""

    importance: Importance = Importance.clip
    """Correction between engine and learner: clip (PPO), truncate (TIS), mask (band), none."""
    clip_low: float = knob(0.2, above=0, most=1)
    """importance=clip: the ratio is held above 1 - clip_low."""
    clip_high: float = knob(0.28, above=0)
    """importance=clip: the ratio is held below 1 + clip_high."""
    cap: float = knob(2.0, above=0)
    """importance=truncate: largest weight of a token."""
    band_low: float = knob(0.5, least=0)
    """importance=mask: tokens whose ratio is below are dropped."""
    band_high: float = knob(2.0, above=0)
    """importance=mask: tokens whose ratio is above are dropped."""
    advantage_clip: float | None = knob(None, above=0)
    """Hold the advantage within plus and minus this many nats."""
    discount: float = knob(0.0, least=0, most=1)
    """Credit a token with the discounted advantages that follow it; 0 is the token's own only."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """How a gradient becomes a step."""

    lr: float = knob(1e-6, above=0)
    """Peak learning rate."""
    weight_decay: float = knob(0.0, least=0)
    """Weight decay on matrices (decoupled for AdamW); vectors are never decayed."""
    schedule: LearningRateSchedule = LearningRateSchedule.constant
    """Shape of the learning rate after warm-up."""
    warmup_steps: int = knob(0, least=0)
    """Steps in which the learning rate rises linearly from zero."""
    min_lr_ratio: float = knob(0.0, least=0, most=1)
    """Where linear and cosine schedules end, as a share of the peak."""
    clip: float = knob(1.0, least=0)
    """Largest global gradient norm; 0 does not clip."""


@dataclass(kw_only=True, slots=True)
class AdamWConfig(OptimConfig):
    """AdamW (Loshchilov and Hutter)."""

    betas: list[float] = knob([0.9, 0.999])
    """Decay of the first and second moment."""
    eps: float = knob(1e-8, above=0)
    """Added to the root of the second moment."""


@dataclass(kw_only=True, slots=True)
class SGDConfig(OptimConfig):
    """Stochastic gradient descent."""

    lr: float = knob(1e-2, above=0)
    """Peak learning rate."""
    momentum: float = knob(0.9, least=0, below=1)
    """Share of the last step that is kept."""
    nesterov: bool = False
    """Look ahead along the momentum."""


@dataclass(kw_only=True, slots=True)
class TrainingConfig:
    """How much is learned, in what pieces and in what numbers."""

    steps: int = knob(100, least=0)
    """Optimizer steps."""
    prompts_per_step: int = knob(64, least=1)
    """Prompts in one optimizer step, over all processes."""
    micro_tokens: int = knob(8192, least=1)
    """Padded tokens in one forward and backward pass of one process; the result does not depend on it."""
    precision: Precision = Precision.bf16
    """bf16 keeps fp32 master weights; pure_bf16 does not and loses small updates."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    stop_after: int | None = knob(None, least=1)
    """Stop after so many steps as if interrupted; schedules go on counting to train.steps."""
    scores: Watched = Watched.none
    """Leave this score of every weight in scores.safetensors; fisher and first_gradient move nothing."""
    chunk_mib: int = knob(256, least=1)
    """Largest float32 [tokens, vocabulary] tensor that exists at once, in MiB."""


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """What is trained: everything."""


@dataclass(kw_only=True, slots=True)
class LoraConfig(AdapterConfig):
    """Low-rank adapters (peft)."""

    rank: int = knob(16, least=1)
    """Rank of the update."""
    alpha: float = knob(32.0, above=0)
    """The update is scaled by alpha / rank."""
    dropout: float = knob(0.0, least=0, below=1)
    """Dropout before the adapter; above 0 the learner's log-probs leave the engine's."""
    targets: str = "all-linear"
    """Module names, comma separated, or all-linear."""


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
class LaunchConfig:
    """What changes when the machine changes."""

    processes: int = knob(1, least=1)
    """Training processes on this machine, one per GPU."""
    engine: TrainingEngine = TrainingEngine.deepspeed
    """deepspeed, or torch: one process without DeepSpeed."""
    deepspeed: str | None = None
    """A DeepSpeed JSON file with stage, offload and bucket sizes, as in launch/deepspeed/."""
    threads: int | None = knob(None, least=1)
    """CPU threads of each process; by default the cores shared out evenly."""


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


@dataclass(kw_only=True, slots=True)
class Config:
    """One run of on-policy distillation."""

    run: RunConfig = field(default_factory=RunConfig)
    seed: int = knob(0, least=0)
    """Fixes the prompt order and every sample drawn."""
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = MISSING
    rollout: RolloutConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    loss: LossConfig = MISSING
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
    "teacher": {"server": ServerTeacherConfig, "local": LocalTeacherConfig},
    "rollout": {
        "vllm": VllmRolloutConfig,
        "server": ServerRolloutConfig,
        "transformers": TransformersRolloutConfig,
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


def problems(config: Config) -> list[str]:
    """Every broken bound and rule, one sentence each; empty when the config is sound."""
    found = [*broken_bounds(config)]
    for rule in RULES:
        sentence = rule(config)
        if sentence is not None:
            found.append(sentence)
    return found


def broken_bounds(node: Any, path: str = "") -> Iterator[str]:
    """A sentence for each field of a dataclass, and of those in it, that is not set or out of bounds."""
    for f in fields(node):
        value, name = getattr(node, f.name), f"{path}{f.name}"
        if value == MISSING:
            yield f"{name} is not set: give it in the recipe or as {name}=..."
        elif is_dataclass(value):
            yield from broken_bounds(value, f"{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield from _broken_bound(name, value, f.metadata)


def _broken_bound(name: str, value: float, bounds: Any) -> Iterator[str]:
    if "least" in bounds and not value >= bounds["least"]:
        yield f"{name}={value}: allowed is {bounds['least']} or more"
    if "above" in bounds and not value > bounds["above"]:
        yield f"{name}={value}: allowed is more than {bounds['above']}"
    if "below" in bounds and not value < bounds["below"]:
        yield f"{name}={value}: allowed is less than {bounds['below']}"
    if "most" in bounds and not value <= bounds["most"]:
        yield f"{name}={value}: allowed is {bounds['most']} or less"


def a_teacher_is_named(config: Config) -> str | None:
    """Somebody must score."""
    match config.teacher:
        case ServerTeacherConfig(model=None, url=None):
            return "teacher=server needs teacher.model (a server is started) or teacher.url (one is used)"
        case LocalTeacherConfig(model=None):
            return "teacher=local needs teacher.model=<folder or hub id>"
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
    if isinstance(config.teacher, ServerTeacherConfig) and config.teacher.backend not in (
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
