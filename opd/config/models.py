"""The model that learns, the one that scores, and adapters."""

from dataclasses import dataclass, field
from enum import StrEnum

from omegaconf import MISSING

from opd.config.fields import knob


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


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
    hidden_dtype: DType = DType.auto
    """Format in which hidden states travel; auto is exact: bfloat16 if the teacher computes in it."""
    max_length: int | None = knob(None, least=2)
    """Longest prompt plus completion the teacher takes; by default what its config says."""


@dataclass(kw_only=True, slots=True)
class ServedTeacherConfig(TeacherConfig):
    """Teachers behind HTTP."""

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
class ServerTeacherConfig(ServedTeacherConfig):
    """A vLLM teacher behind HTTP: started with the run, or found at teacher.url."""

    url: str | None = None
    """Address of a running `opd teacher`; without it the run starts one from teacher.model."""


@dataclass(kw_only=True, slots=True)
class PoolTeacherConfig(ServedTeacherConfig):
    """Several teachers behind HTTP; each prompt names the one that scores it."""

    members: dict[str, str] = field(default_factory=dict)
    """Name in the prompts: model folder or hub id, or addresses of running servers, comma separated."""
    replicas: int = knob(1, least=1)
    """Servers started with the run for each model; one that dies is stood in for by the others."""


@dataclass(kw_only=True, slots=True)
class LocalTeacherConfig(TeacherConfig):
    """A Hugging Face teacher inside each training process."""

    batch_tokens: int = knob(8192, least=1)
    """Padded tokens in one forward pass of the teacher."""


@dataclass(kw_only=True, slots=True)
class NoTeacherConfig(TeacherConfig):
    """Nobody scores, for losses that ask nothing of a teacher."""


class SelfTeacher(StrEnum):
    frozen = "frozen"
    ema = "ema"
    latest = "latest"


@dataclass(kw_only=True, slots=True)
class SelfTeacherConfig(TeacherConfig):
    """The student itself scores, usually with a prompt that says more (data.teacher_template).

    dtype auto is float32 here; model is not read.
    """

    weights: SelfTeacher = SelfTeacher.frozen
    """frozen: as it started (with adapters: switched off, no second copy); ema; or latest."""
    decay: float = knob(0.99, least=0, below=1)
    """teacher.weights=ema: share of the average that a step keeps."""
    batch_tokens: int = knob(8192, least=1)
    """Padded tokens in one forward pass of the teacher."""


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
