"""What a teacher server can be told, and its command line."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from opd.config.models import DType
from opd.serving.options import parse_options

TOKEN_VARIABLE = "OPD_TEACHER_TOKEN"


class BackendName(StrEnum):
    """What computes the teacher's hidden states."""

    vllm = "vllm"
    torch = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherServerOptions:
    """Score token sequences over HTTP; the token is in ``OPD_TEACHER_TOKEN``.

    ``model``: checkpoint folder or hub name.
    ``host``: address to bind; anything but loopback needs a token.
    ``port``: port to bind; 0 takes a free one.
    ``port_file``: file that gets the port once requests are answered.
    ``backend``: what computes hidden states.
    ``dtype``: precision of the model; auto: as the checkpoint has it.
    ``max_length``: longest sequence; default: the model's own limit.
    ``batch_tokens``: tokens of one engine step.
    ``group_tokens``: tokens of waiting requests that are answered together.
    ``tensor_parallel_size``: GPUs that share the model.
    ``gpu_memory_fraction``: the engine's share of each GPU; the head lies beside it.
    ``kv_cache_bytes``: the engine's cache on a machine without GPU.
    ``max_body_bytes``: largest request body.
    ``max_answer_bytes``: largest answer.
    ``exit_with_parent``: end when the process that started this one is gone.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 0
    port_file: str | None = None
    backend: BackendName = BackendName.vllm
    dtype: DType = DType.auto
    max_length: int | None = None
    batch_tokens: int = 8192
    group_tokens: int = 65536
    tensor_parallel_size: int = 1
    gpu_memory_fraction: float = 0.8
    kv_cache_bytes: int = 1 << 30
    max_body_bytes: int = 64 << 20
    max_answer_bytes: int = 1 << 30
    exit_with_parent: bool = False


def parse(arguments: Sequence[str] | None = None) -> TeacherServerOptions:
    """The options that a command line names."""
    return parse_options(TeacherServerOptions, "opd teacher", arguments)
