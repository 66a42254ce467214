"""A refusal of vLLM is one sentence with its own words and the settings that it names."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, model_validator
from torch import nn

from opd.vllm_start import (
    EXACT_FLOAT32,
    explain_refusal,
    restore_classes,
    set_exact_float32,
)

GIVEN = {"max_model_len": 4096, "enable_chunked_prefill": False, "dtype": "float32"}


class Chunked(BaseModel):
    @model_validator(mode="after")
    def refuse(self) -> "Chunked":
        raise ValueError("hybrid models need chunked prefill\n(set enable_chunked_prefill)")


class Typed(BaseModel):
    dtype: int


def refused(make: object) -> str:
    with pytest.raises(ValueError, match="vLLM cannot start") as error:  # noqa: SIM117
        with explain_refusal("models/one", GIVEN, "rollout"):
            make()  # pyright: ignore
    return str(error.value)


def plain() -> None:
    raise ValueError("User-specified max_model_len (4096) is greater than\n the derived one (128)")


def other() -> None:
    raise ValueError("Model architectures ['X'] are not supported")


def test_the_words_of_pydantic_and_our_setting_are_in_the_sentence() -> None:
    said = refused(Chunked)
    assert "hybrid models need chunked prefill (set enable_chunked_prefill)" in said
    assert "it was given enable_chunked_prefill=False" in said
    assert "validation error" not in said
    assert "rollout=transformers" in said
    assert "Input should be a valid integer" in refused(lambda: Typed(dtype="x"))  # pyright: ignore


def test_plain_errors_are_one_line_too() -> None:
    assert "is greater than the derived one (128); it was given max_model_len=4096" in refused(
        plain
    )
    assert "['X'] are not supported. Change the rollout settings" in refused(other)
    assert all("\n" not in refused(make) for make in (plain, other, Chunked))


def test_a_tensor_that_a_loader_does_not_know_is_named() -> None:
    def load() -> None:
        raise KeyError("layers.1.mlp.gate.e_score_correction_bias")

    assert "it does not know 'layers.1.mlp.gate.e_score_correction_bias'" in refused(load)


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="out of memory"), explain_refusal("m", {}, "teacher"):
        raise RuntimeError("out of memory")


def test_float32_products_are_exact_unless_the_caller_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [(name, value)] = EXACT_FLOAT32.items()
    monkeypatch.setenv(name, "tf32")
    set_exact_float32()
    assert os.environ[name] == "tf32"
    monkeypatch.delenv(name)
    set_exact_float32()
    assert os.environ.pop(name) == value


class Wrapper:
    """In place of vLLM's base class of compiled modules."""


Wrapper.__module__ = "vllm.compilation.wrapper"


def decorated(cls: Any) -> None:
    """As vLLM's ``support_torch_compile`` changes a class."""
    old_init = cls.__init__

    def __init__(self: Any, *args: Any, config: object = None) -> None:
        assert config is not None, "Current vLLM config is not set"
        old_init(self, *args)

    def __call__(self: Any, *args: Any) -> Any:
        return ("by vLLM", self.forward(*args))

    __init__.__module__ = __call__.__module__ = "vllm.compilation.decorators"
    cls.__bases__ = (*cls.__bases__, Wrapper)
    cls.__init__, cls.__call__ = __init__, __call__


def test_a_class_that_vllm_has_decorated_is_as_before_and_the_engine_keeps_its_own() -> None:
    class Parent(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

    class Model(Parent):
        def forward(self, x: int) -> int:
            return self.width * x

    bases, members = Model.__bases__, set(vars(Model))
    decorated(Model)
    with pytest.raises(AssertionError, match="config is not set"):
        Model(3)
    engine: Any = nn.ModuleDict({"model": Model(3, config=1)})  # pyright: ignore[reportCallIssue]
    restore_classes(SimpleNamespace(get_model=lambda: engine))
    restore_classes(SimpleNamespace(get_model=lambda: engine))
    learner = Model(2)
    calls: list[int] = []
    learner.register_forward_hook(lambda module, args, out: calls.append(out))
    assert (learner(5), calls) == (10, [10])
    assert Model.__bases__ == bases
    assert set(vars(Model)) - members <= {"__init__"}
    inside = engine["model"]
    assert inside(5) == ("by vLLM", 15)
    assert isinstance(inside, Model)
    assert isinstance(inside, Wrapper)
    assert str(type(inside)) == str(Model)


@pytest.mark.parametrize(
    "error", [AssertionError("no group"), AttributeError("no conv_dim"), NotImplementedError("x")]
)
def test_what_vllm_raises_for_models_that_it_cannot_serve_is_a_sentence(error: Exception) -> None:
    def fail() -> None:
        raise error

    said = refused(fail)
    assert f"{type(error).__name__}: {error}" in said
    assert "rollout=transformers" in said
