"""What a teacher server can be told, and its command line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from typing import Any

from opd.config import DType

TOKEN_VARIABLE = "OPD_TEACHER_TOKEN"


class BackendName(StrEnum):
    """What computes the teacher's hidden states."""

    vllm = "vllm"
    torch = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherServerOptions:
    """Everything but the token, which travels in the environment as ``OPD_TEACHER_TOKEN``.

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
    parser = argparse.ArgumentParser(
        prog="python -m opd.teacher.server", description="Score token sequences over HTTP."
    )
    told = dict(re.findall(r"``(\w+)``: (.+)\.", TeacherServerOptions.__doc__ or ""))
    for option in fields(TeacherServerOptions):
        shown = "" if option.default in (MISSING, None) else f" (default: {option.default})"
        parser.add_argument(
            _flag(option.name),
            required=option.default is MISSING,
            default=option.default,
            help=told.get(option.name, "") + shown,
            **_reading(option.type),
        )
    return TeacherServerOptions(**vars(parser.parse_args(arguments)))


def arguments_of(options: TeacherServerOptions) -> list[str]:
    """The command line that ``parse`` reads back into ``options``."""
    arguments = []
    for option in fields(options):
        value = getattr(options, option.name)
        if value is True:
            arguments.append(_flag(option.name))
        elif value is not None and value is not False:
            arguments.append(f"{_flag(option.name)}={value}")
    return arguments


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _reading(kind: Any) -> dict[str, Any]:
    if kind is bool:
        return {"action": "store_true"}
    if kind in (BackendName, DType):
        return {"type": kind, "choices": list(kind)}
    return {"type": {int | None: int, str | None: str}.get(kind, kind)}
