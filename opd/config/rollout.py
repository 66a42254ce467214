"""``rollout``: what generates, and how. Settings have vLLM's names."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from omegaconf import MISSING

from opd.config.fields import bounded
from opd.config.serving import ALONE, ServingConfig
from opd.config.student import DType
from opd.config.train import Precision
from opd.types import Sampling

if TYPE_CHECKING:
    from opd.config.schema import Config


LEAST_TEMPERATURE = 0.01
"""Of sampling; vLLM silently uses this one for smaller ones, and the learner would score another."""


@dataclass(kw_only=True, slots=True)
class RolloutConfig:
    """What generates, and how."""

    n: int = bounded(1, least=1)
    """Completions per prompt."""
    temperature: float = bounded(1.0, least=LEAST_TEMPERATURE)
    """Sampling temperature; learner and teacher are scored at the same one."""
    top_p: float = bounded(1.0, above=0, most=1)
    """Nucleus sampling; below 1 the learner cannot reproduce the engine's log-probs exactly."""
    top_k: int = -1
    """Sample among the k likeliest tokens only; -1 is all of them."""
    max_tokens: int = bounded(256, least=1)
    """Longest completion, in tokens."""
    dtype: DType = DType.auto
    """Number format of the engine's weights; auto is the learner's compute precision."""
    on_policy: float = bounded(1.0, least=0, most=1)
    """Share of prompts that the student completes; data.completion_field holds the other completions."""


SHARED_ENGINE = 0.35
"""gpu_memory_utilization of a rollout engine beside a learner, where nobody chose another."""


@dataclass(kw_only=True)  # no slots: it is mixed into others
class VllmEngineConfig:
    """How a vLLM engine is started."""

    gpu_memory_utilization: float | None = bounded(None, above=0, most=1)
    """Share of the GPU's memory that the engine may use; by default 0.35, or 0.8 on a GPU of its own."""
    kv_cache_memory_bytes: int | None = bounded(None, least=1)
    """Size of the key-value cache; by default what the share leaves, on CPU 512 MiB."""
    max_model_len: int | None = bounded(None, least=2)
    """Longest prompt plus completion; by default what data and rollout.max_tokens need."""
    enforce_eager: bool | None = None
    """Skip graph capture; by default true on CPU and false on CUDA."""


@dataclass(kw_only=True, slots=True)
class VllmRolloutConfig(VllmEngineConfig, RolloutConfig):
    """A vLLM engine inside each training process."""

    enable_sleep_mode: bool = True
    """On CUDA, free the engine's memory while the learner works."""


@dataclass(kw_only=True, slots=True)
class ServerRolloutConfig(VllmEngineConfig, RolloutConfig):
    """vLLM engines in processes of their own, behind HTTP; only changed weights are sent."""

    urls: list[str] = bounded([])
    """Addresses of running `opd rollout`; without them the run starts rollout.servers of them."""
    servers: int = bounded(1, least=1)
    """How many to start with the run; rank r sends its prompts to server r modulo their number."""
    devices: str | None = None
    """GPUs of the servers that the run starts, comma separated, one each; by default those free of ranks."""
    timeout: float = bounded(600.0, above=0)
    """Seconds before a request, a whole generation, times out; after three in a row it is given up."""
    retries: int = bounded(8, least=0)
    """Retries of a failed request, with exponential back-off; 8 take about 90 seconds."""
    restarts: int = bounded(2, least=0)
    """How often each server started with the run is started again when it dies or does not answer."""


@dataclass(kw_only=True, slots=True)
class TransformersRolloutConfig(RolloutConfig):
    """model.generate() of transformers, for machines without vLLM."""

    batch_size: int = bounded(64, least=1)
    """Sequences generated at once."""


@dataclass(kw_only=True, slots=True)
class DatasetRolloutConfig(RolloutConfig):
    """No engine: every completion is the data set's, and nothing can be evaluated."""

    on_policy: float = bounded(0.0, least=0, most=0)
    """Share of prompts that the student completes: none."""


CHOICES = {
    "vllm": VllmRolloutConfig,
    "server": ServerRolloutConfig,
    "transformers": TransformersRolloutConfig,
    "dataset": DatasetRolloutConfig,
}


class RolloutBackend(StrEnum):
    """What generates in a rollout server."""

    vllm = "vllm"
    transformers = "transformers"


@dataclass(kw_only=True, slots=True)
class RolloutServerConfig(VllmEngineConfig, ServingConfig):
    """Generate over HTTP, with weights that a run sends; the token is in OPD_ROLLOUT_TOKEN."""

    model: str = MISSING
    """Checkpoint folder or hub id: the student to start from."""
    backend: RolloutBackend = RolloutBackend.vllm
    """What generates; transformers is slow and for machines without vLLM."""
    dtype: DType = DType.bfloat16
    """Number format of the weights; it must be the run's rollout.dtype."""
    seed: int = bounded(0, least=0)
    """The engine's own seed; every request has its own."""
    gpu_memory_utilization: float | None = bounded(ALONE, above=0, most=1)
    """Share of the GPU's memory that the engine may use; a server has the GPU to itself."""
    batch_size: int = bounded(64, least=1)
    """backend=transformers: sequences generated at once."""
    trust_remote_code: bool = False
    """Run code that comes with the model; off by default."""
    max_request_bytes: int = bounded(1 << 40, least=1)
    """Largest request body; snapshots hold all weights."""


def training_sampling(config: "Config") -> Sampling:
    """Sampling of training rollouts; a loss on the student's support needs its ids from the engine."""
    rollout = config.rollout
    return Sampling(
        n=rollout.n,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        max_tokens=rollout.max_tokens,
        seed=config.seed,
        support_k=config.loss.engine_support_k(),
    )


def engine_dtype(config: "Config") -> DType:
    """The number format of the rollout engine's weights; never auto."""
    if config.rollout.dtype == DType.auto:
        return DType.float32 if config.train.precision == Precision.fp32 else DType.bfloat16
    return config.rollout.dtype


def rewards_are_compared_in_groups(config: "Config") -> str | None:
    """A group of one completion has no spread."""
    if config.reward.is_given and config.rollout.n < 2:
        return (
            f"reward=... compares the completions of a prompt with each other, found "
            f"rollout.n={config.rollout.n}: use 2 or more"
        )
    return None


RULES = (rewards_are_compared_in_groups,)
