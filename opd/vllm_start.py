"""What is the same for every start of a vLLM engine: its workers, its refusals, what it leaves behind."""

import inspect
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
    """Turn a refusal of vLLM's start, whatever it raises for a model that it cannot serve, into one sentence.

    ``arguments`` are those that vLLM was given; the ones that it names are listed with their values, as
    settings of ``room`` (rollout or teacher).
    """
    try:
        yield
    except (ValueError, KeyError, AttributeError, AssertionError, NotImplementedError) as error:
        reason = " ".join("; ".join(_messages(error)).split())
        named = [f"{name}={value}" for name, value in arguments.items() if name in reason]
        given = f"; it was given {', '.join(named)}" if named else ""
        raise ValueError(
            f"vLLM cannot start with {model}: {reason}{given}. Change the {room} settings that it names, or "
            f"use {room}={ALTERNATIVES[room]}"
        ) from error


def restore_classes(worker: Any) -> None:
    """Give back the classes of transformers that vLLM has decorated in the process of ``worker``.

    A family without a model of vLLM's own is served by its transformers module, whose class vLLM
    decorates: other models of this class, such as the learner, then fail without a config of vLLM, and
    skip the hooks of their modules. The decoration is moved to a subclass, of which the engine's module
    becomes an instance.
    """
    subclasses: dict[type, type] = {}
    for module in worker.get_model().modules():
        cls = type(module)
        if cls not in subclasses and _decorations(cls):
            subclasses[cls] = _moved_to_subclass(cls)
        if cls in subclasses:
            module.__class__ = subclasses[cls]


def _is_of_vllm(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("vllm.")


def _decorations(cls: type) -> tuple[type, ...]:
    """The bases that vLLM has added to a class that is not its own."""
    return () if _is_of_vllm(cls) else tuple(base for base in cls.__bases__ if _is_of_vllm(base))


def _moved_to_subclass(cls: Any) -> type:
    """A subclass with what vLLM has put into ``cls``, which is left as it was."""
    added = _decorations(cls)
    decorated = {name: value for name, value in vars(cls).items() if _is_of_vllm(value)}
    own_init = inspect.getclosurevars(decorated["__init__"]).nonlocals["old_init"]
    for name in decorated:
        delattr(cls, name)
    cls.__init__ = own_init
    cls.__bases__ = tuple(base for base in cls.__bases__ if base not in added)
    # the same name: transformers keeps what it knows of a class under it
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls, *added), {**names, **decorated})


ALTERNATIVES = {"rollout": "transformers", "teacher": "local"}


def _messages(error: Exception) -> list[str]:
    """The messages of a pydantic ValidationError, which its first line only counts; else the error's own."""
    if isinstance(error, KeyError):
        return [f"it does not know {error}"]
    if not isinstance(error, ValueError):
        return [f"{type(error).__name__}: {error}"]
    errors = getattr(error, "errors", None)
    if errors is None:
        return [str(error)]
    return [each["msg"].removeprefix("Value error, ") for each in errors()]
