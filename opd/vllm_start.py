"""What is the same for every start of a vLLM engine: how its workers start, and what a refusal says."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

CHILDREN = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""torch.cuda.is_available() initialises the driver, after which a forked worker cannot use CUDA, and vLLM
forks by default. Workers are spawned, and torch asks NVML instead of the driver."""


def set_start_method() -> None:
    """Set ``CHILDREN`` for this process and its children, where the caller has not; before torch looks
    for CUDA."""
    for name, value in CHILDREN.items():
        os.environ.setdefault(name, value)


EXACT_FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}
"""vLLM computes attention in float32 with Triton, which multiplies float32 matrices as TF32 (10 bits of
mantissa) where a kernel states no precision, as this one. torch's own products are exact by default."""


def set_exact_float32() -> None:
    """Set ``EXACT_FLOAT32`` for this process and its children, where the caller has not.

    For engines that compute in float32, before their first forward pass: Triton reads it when it compiles.
    """
    for name, value in EXACT_FLOAT32.items():
        os.environ.setdefault(name, value)


@contextmanager
def explain_refusal(model: str, arguments: Mapping[str, Any], room: str) -> Iterator[None]:
    """Turn a ValueError of vLLM's start, or a KeyError of its loaders, into one sentence.

    ``arguments`` are those that vLLM was given; the ones that it names are listed with their values, as
    settings of ``room`` (rollout or teacher).
    """
    try:
        yield
    except (ValueError, KeyError) as error:
        reason = " ".join("; ".join(_messages(error)).split())
        named = [f"{name}={value}" for name, value in arguments.items() if name in reason]
        given = f"; it was given {', '.join(named)}" if named else ""
        raise ValueError(
            f"vLLM cannot start with {model}: {reason}{given}. Change the {room} settings that it names, or "
            f"use {room}={ALTERNATIVES[room]}"
        ) from error


ALTERNATIVES = {"rollout": "transformers", "teacher": "local"}


def _messages(error: ValueError | KeyError) -> list[str]:
    """The messages of a pydantic ValidationError, which its first line only counts; else the error's own."""
    if isinstance(error, KeyError):
        return [f"it does not know {error}"]
    errors = getattr(error, "errors", None)
    if errors is None:
        return [str(error)]
    return [each["msg"].removeprefix("Value error, ") for each in errors()]
