"""What a rollout server can be told."""

from dataclasses import dataclass
from enum import StrEnum

from opd.config.models import DType

TOKEN_VARIABLE = "OPD_ROLLOUT_TOKEN"


class EngineName(StrEnum):
    """What generates."""

    vllm = "vllm"
    transformers = "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutServerOptions:
    """Generate over HTTP, with weights that a run sends; the token is in ``OPD_ROLLOUT_TOKEN``.

    ``model``: checkpoint folder or hub name, the student to start from.
    ``host``: address to bind; anything but loopback needs a token.
    ``port``: port to bind; 0 takes a free one.
    ``port_file``: file that gets the port once requests are answered.
    ``engine``: what generates; transformers is slow and for machines without vLLM.
    ``dtype``: precision of the weights, the run's rollout.dtype.
    ``max_length``: longest prompt plus completion; default: the model's own limit.
    ``seed``: the engine's own seed; every request brings one besides.
    ``gpu_memory_fraction``: the engine's share of the GPU.
    ``kv_cache_mib``: size of the key-value cache in MiB; default: what the fraction leaves, on CPU 512.
    ``eager``: skip graph capture; default: on CPU.
    ``batch_size``: sequences generated at once by transformers.
    ``trust_remote_code``: run code that comes with the model.
    ``max_body_bytes``: largest request; weights come whole at times.
    ``exit_with_parent``: end when the process that started this one is gone.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 0
    port_file: str | None = None
    engine: EngineName = EngineName.vllm
    dtype: DType = DType.bfloat16
    max_length: int | None = None
    seed: int = 0
    gpu_memory_fraction: float = 0.8
    kv_cache_mib: int | None = None
    eager: bool | None = None
    batch_size: int = 64
    trust_remote_code: bool = False
    max_body_bytes: int = 1 << 40
    exit_with_parent: bool = False
