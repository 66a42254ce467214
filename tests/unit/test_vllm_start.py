"""A refusal of vLLM is one sentence with its own words and the settings that it names."""

import os

import pytest
from pydantic import BaseModel, model_validator

from opd.vllm_start import EXACT_FLOAT32, explain_refusal, set_exact_float32

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
