"""``teacher``: the model that scores. Settings have vLLM's names."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from omegaconf import MISSING

from opd.config.adapter import LoraConfig
from opd.config.fields import bounded
from opd.config.launch import LaunchEngine
from opd.config.serving import ALONE, ServingConfig
from opd.config.student import DType

if TYPE_CHECKING:
    from opd.config.schema import Config


class TeacherBackend(StrEnum):
    """What computes the hidden states of a teacher server."""

    vllm = "vllm"
    torch = "torch"


class TeacherTokenizer(StrEnum):
    """Whose tokens the teacher scores.

    shared: the student's, which must be its own too. own: those that its own tokenizer makes of the text;
    spans of the same text are aligned.
    """

    shared = "shared"
    own = "own"


@dataclass(kw_only=True)  # no slots: it is mixed into others
class TeacherModelConfig:
    """How a teacher's weights are loaded and run, wherever it runs."""

    dtype: DType = DType.auto
    """Number format of the teacher's weights; auto is the checkpoint's own."""
    max_model_len: int | None = bounded(None, least=2)
    """Longest prompt plus completion the teacher takes; by default the one in its config."""
    max_num_batched_tokens: int = bounded(8192, least=1)
    """Tokens in one forward pass of the teacher."""


SHARED_TEACHER = 0.45
"""gpu_memory_utilization of the teachers beside a learner, where nobody chose another."""


@dataclass(kw_only=True)  # no slots: it is mixed into others
class TeacherEngineConfig(TeacherModelConfig):
    """How a teacher server is started."""

    backend: TeacherBackend = TeacherBackend.vllm
    """Engine of the server: vllm, or torch where there is no vLLM."""
    tensor_parallel_size: int | None = bounded(None, least=1)
    """GPUs over which the server splits the teacher; by default as many as are free of ranks, or 1."""
    gpu_memory_utilization: float | None = bounded(None, above=0, most=1)
    """Share of each GPU's memory that the engine may use; by default 0.45, on GPUs of its own 0.8."""
    kv_cache_memory_bytes: int = bounded(1 << 30, least=1)
    """Size of the key-value cache on a machine without GPU."""
    max_waiting_tokens: int = bounded(65536, least=1)
    """Tokens of waiting requests that are answered together; more of them wait for their turn."""
    max_request_bytes: int = bounded(64 << 20, least=1)
    """Largest request body."""
    max_response_bytes: int = bounded(1 << 30, least=1)
    """Largest response; nothing more is computed while so many bytes wait to be sent."""
    sleep: bool = False
    """Leave the GPUs while nobody scores: for a teacher on cards where the student generates or learns."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig(TeacherModelConfig):
    """The model that scores."""

    model: str | None = None
    """Folder or Hub id of the teacher; name@revision fixes a commit, tag or branch."""
    tokenizer: TeacherTokenizer = TeacherTokenizer.shared
    """shared: teacher and student need one vocabulary; own: the teacher reads the text in its own tokens."""
    hidden_dtype: DType = DType.auto
    """Format in which hidden states are sent; auto is exact: bfloat16 if the teacher computes in it."""


@dataclass(kw_only=True, slots=True)
class ServedTeacherConfig(TeacherEngineConfig, TeacherConfig):
    """Teachers behind HTTP."""

    timeout: float = bounded(300.0, above=0)
    """Seconds without progress before a request times out; after three time-outs in a row it is given up."""
    retries: int = bounded(4, least=0)
    """Retries of a failed request, with exponential back-off; waiting for a busy server spends none."""
    devices: str | None = None
    """GPUs of the servers started with the run, comma separated; by default those free of ranks."""
    replicas: int = bounded(1, least=1)
    """Servers started with the run for each model; if one dies, the others take over its requests."""
    restarts: int = bounded(2, least=0)
    """How often each server started with the run is started again when it dies or does not answer."""


@dataclass(kw_only=True, slots=True)
class ServerTeacherConfig(ServedTeacherConfig):
    """One teacher behind HTTP: its servers are started with the run, or found at teacher.url."""

    url: str | None = None
    """Addresses of running `opd teacher`s of one model, comma separated; without it the run starts them."""


@dataclass(kw_only=True, slots=True)
class PoolTeacherConfig(ServedTeacherConfig):
    """Several teachers behind HTTP; each prompt names the one that scores it."""

    members: dict[str, str] = field(default_factory=dict)
    """Name in the prompts: model folder or hub id, or addresses of running servers, comma separated."""


@dataclass(kw_only=True, slots=True)
class LocalTeacherConfig(TeacherConfig):
    """A Hugging Face teacher inside each training process."""


@dataclass(kw_only=True, slots=True)
class NoTeacherConfig(TeacherConfig):
    """No teacher, for losses that need none; what a recipe sets for its teacher has no effect."""


class SelfTeacher(StrEnum):
    frozen = "frozen"
    ema = "ema"
    latest = "latest"


@dataclass(kw_only=True, slots=True)
class SelfTeacherConfig(TeacherConfig):
    """The student scores itself, usually with privileged context (data.teacher_template).

    dtype auto is float32 here; model is not read.
    """

    weights: SelfTeacher = SelfTeacher.frozen
    """frozen: the initial weights (with adapters: switched off, no second copy); ema; or latest."""
    ema_decay: float = bounded(0.99, least=0, below=1)
    """teacher.weights=ema: share of the average that a step keeps."""


CHOICES = {
    "server": ServerTeacherConfig,
    "local": LocalTeacherConfig,
    "pool": PoolTeacherConfig,
    "self": SelfTeacherConfig,
    "none": NoTeacherConfig,
}


@dataclass(kw_only=True, slots=True)
class TeacherServerConfig(TeacherEngineConfig, ServingConfig):
    """Score token sequences over HTTP; the token is in OPD_TEACHER_TOKEN."""

    model: str = MISSING
    """Checkpoint folder or hub id of the teacher."""
    tensor_parallel_size: int | None = bounded(1, least=1)
    """GPUs over which the server splits the teacher."""
    gpu_memory_utilization: float | None = bounded(ALONE, above=0, most=1)
    """Share of each GPU's memory that the engine may use; the output head lies beside it."""


def has_teacher(config: "Config") -> bool:
    """Whether there is a teacher, be it for the evaluation alone."""
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


def a_teacher_is_named(config: "Config") -> str | None:
    """A loss that needs a teacher's log-probs needs a teacher."""
    if not config.loss.needs_teacher:
        return None
    match config.teacher:
        case NoTeacherConfig():
            return (
                "teacher=none, and this loss needs one: use teacher=local or server with "
                "teacher.model, teacher=self, or a loss that needs none (nll, grpo)"
            )
        case ServerTeacherConfig(model=None, url=None):
            return "teacher=server needs teacher.model (a server is started) or teacher.url (one is used)"
        case ServerTeacherConfig(url=str(url)) if not url.strip(" ,"):
            return f"teacher.url={url!r} holds no address: give http://HOST:PORT, or null"
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


def an_average_is_float32(config: "Config") -> str | None:
    """bfloat16 would round steps of a hundredth of a weight away."""
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


def adapters_switched_off_are_whole(config: "Config") -> str | None:
    """ZeRO-3 keeps no whole weight on which adapters could be switched off."""
    if (
        isinstance(config.teacher, SelfTeacherConfig)
        and config.teacher.weights == SelfTeacher.frozen
        and isinstance(config.adapter, LoraConfig)
        and config.zero == 3
        and config.launch.engine == LaunchEngine.deepspeed
    ):
        return (
            "teacher=self with adapter=lora reads the student's weights with adapters off, and zero=3 "
            "shards them: use zero=2, or teacher=local teacher.model=<the student>"
        )
    return None


def an_own_tokenizer_is_known(config: "Config") -> str | None:
    """A teacher with a tokenizer of its own is one model, whose files are here."""
    if config.teacher.tokenizer == TeacherTokenizer.shared or not has_teacher(config):
        return None
    match config.teacher:
        case PoolTeacherConfig() | SelfTeacherConfig():
            kind = "pool" if isinstance(config.teacher, PoolTeacherConfig) else "self"
            return (
                f"teacher.tokenizer=own is for teacher=server and teacher=local, found teacher={kind}: use "
                "one of them, or leave teacher.tokenizer out"
            )
        case ServerTeacherConfig(url=str(url), model=None):
            return (
                f"teacher.tokenizer=own and teacher.url={url} need teacher.model too, the folder or hub id "
                "from which the teacher's tokenizer is read here"
            )
    if config.data.teacher_chat_template is not None:
        return (
            f"data.teacher_chat_template={config.data.teacher_chat_template} cannot be used with "
            "teacher.tokenizer=own, which uses the teacher's own chat template: leave it out"
        )
    return None


RULES = (
    a_teacher_is_named,
    an_average_is_float32,
    adapters_switched_off_are_whole,
    an_own_tokenizer_is_known,
)
