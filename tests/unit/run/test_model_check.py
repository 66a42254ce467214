"""What the config of a student shows before any weight is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from opd.config.schema import Config, problems
from opd.run.model_check import check_student_model
from opd.run.recipe import load_recipe

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def config(folder: Path, family: str, *overrides: str, **settings: Any) -> Config:
    """The quickstart with a student of which only config.json exists."""
    CONFIG_MAPPING[family](**(SIZES | settings)).save_pretrained(folder)
    return load_recipe("quickstart", f"student.model={folder}", *overrides).config


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "q_proj"),
        ("llama", "q_proj, v_proj"),
        ("llama", " q_proj ,, v_proj,"),
        ("llama", "self_attn.q_proj"),
        ("gpt2", "c_attn"),
        ("llama", "all-linear"),
        ("llama", "embed_tokens"),
    ],
)
def test_targets_that_are_there_are_accepted(tmp_path: Path, family: str, targets: str) -> None:
    chosen = config(
        tmp_path,
        family,
        "adapter=lora",
        f"adapter.target_modules='{targets}'",
        tie_word_embeddings=False,
    )
    check_student_model(chosen)


@pytest.mark.parametrize(
    ("targets", "tied", "words"),
    [
        ("q_proj,value_proj", False, "'value_proj', which the student does not have.*q_proj"),
        ("q", False, "'q', which the student does not have"),
        ("Q_PROJ", False, "'Q_PROJ', which the student does not have"),
        ("lm_head", False, "'lm_head', which is applied as a plain matrix"),
        ("q_proj,lm_head", True, "'lm_head', which is applied as a plain matrix"),
        ("embed_tokens", True, "'embed_tokens', which is tied to the output head"),
    ],
)
def test_targets_that_cannot_be_trained_are_named(
    tmp_path: Path, targets: str, tied: bool, words: str
) -> None:
    chosen = config(
        tmp_path,
        "llama",
        "adapter=lora",
        f"adapter.target_modules='{targets}'",
        tie_word_embeddings=tied,
    )
    with pytest.raises(ValueError, match=words):
        check_student_model(chosen)


def test_an_adapter_without_a_target_is_a_mistake() -> None:
    chosen = load_recipe("quickstart", "adapter=lora", "adapter.target_modules=' , '").config
    assert any("names no module" in problem for problem in problems(chosen))


def test_adapter_dropout_needs_dropout() -> None:
    off = load_recipe("quickstart", "adapter=lora", "adapter.lora_dropout=0.1").config
    assert any("train.dropout=true" in problem for problem in problems(off))
    on = load_recipe(
        "quickstart", "adapter=lora", "adapter.lora_dropout=0.1", "train.dropout=true"
    ).config
    assert problems(on) == []


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("gpt2", {"attn_pdrop": 0.1, "resid_pdrop": 0.1}),
        ("mixtral", {"router_jitter_noise": 0.01}),
    ],
)
def test_dropout_that_is_left_out_is_said(
    tmp_path: Path, family: str, rates: dict[str, float]
) -> None:
    chosen = config(tmp_path, family, **rates)
    (said,) = check_student_model(chosen)
    assert all(f"{name}={value:g}" in said for name, value in rates.items())
    assert "train.dropout=true" in said
    chosen.train.dropout = True
    assert check_student_model(chosen) == []


@pytest.mark.parametrize(
    ("family", "settings", "overrides", "words"),
    [
        ("phi", {}, [], "no output head or one with a bias"),
        ("llama", {}, ["student.attn_implementation=sdpaa"], "sdpaa"),
        ("llama", {}, ["student.attn_implementation=flash_attention_2"], "[Ff]lash"),
        ("t5", {}, [], "T5|t5"),
    ],
)
def test_an_architecture_that_cannot_be_trained_is_one_sentence(
    tmp_path: Path, family: str, settings: dict[str, Any], overrides: list[str], words: str
) -> None:
    chosen = config(tmp_path, family, *overrides, **settings)
    with pytest.raises(ValueError, match=words) as error:
        check_student_model(chosen)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes"])
def test_a_quantised_student_is_refused(tmp_path: Path, method: str) -> None:
    chosen = config(tmp_path, "llama")
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text()) | {"quantization_config": {"quant_method": method}}
    file.write_text(json.dumps(settings))
    with pytest.raises(
        ValueError, match=rf"is quantised \({method}\): training needs plain weights"
    ):
        check_student_model(chosen)
