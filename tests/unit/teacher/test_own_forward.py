"""A teacher that computes another model than transformers is refused when it starts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from opd.config.student import DType
from opd.config.teacher import LocalTeacherConfig
from opd.head import HeadSpec
from opd.teacher import backend_torch, backend_vllm
from opd.teacher.backend_torch import TorchBackend
from opd.teacher.model_info import probe_text

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "granite": {"logits_scaling": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 16},
    "falcon_h1": {
        "lm_head_multiplier": 2.0,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
}
CONFIG = LocalTeacherConfig(dtype=DType.float32)


@pytest.fixture(params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path: Path, quickstart: Path) -> str:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **FAMILIES[request.param],
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(quickstart / "teacher").save_pretrained(tmp_path)
    return str(tmp_path)


def served(backend: TorchBackend, **changed: Any) -> Any:
    """What vLLM's back end has, computed by transformers, with something changed."""
    parts = {"hidden": backend.hidden, "head_VD": backend.head_VD, "spec": backend.spec}
    engine = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    return SimpleNamespace(engine=engine, **(parts | changed))


def test_a_right_teacher_is_accepted(teacher: str) -> None:
    backend = TorchBackend(teacher, CONFIG)
    backend_vllm._require_own_forward(served(backend), teacher)


def wrong_parts(backend: TorchBackend) -> dict[str, dict[str, Any]]:
    spec, head = backend.spec, backend.head_VD
    return {
        "scale": {"spec": replace(spec, scale=spec.scale * 1.1)},
        "cap": {"spec": replace(spec, softcap=1.0)},
        "head": {"head_VD": head.roll(1, 0)},
        "norm": {"hidden": lambda ids: [2 * h for h in backend.hidden(ids)]},
        "shift": {"hidden": lambda ids: [h.roll(1, 0) for h in backend.hidden(ids)]},
    }


@pytest.mark.parametrize("part", ["scale", "cap", "head", "norm", "shift"])
def test_an_engine_that_computes_another_model_is_refused(teacher: str, part: str) -> None:
    backend = TorchBackend(teacher, CONFIG)
    wrong = served(backend, **wrong_parts(backend)[part])
    with pytest.raises(ValueError, match=r"in vLLM: log-probs differ from the model's own forward"):
        backend_vllm._require_own_forward(wrong, teacher)


@pytest.mark.parametrize("wrong", [{"scale": 0.9}, {"softcap": 0.7}])
def test_a_local_teacher_with_a_wrong_head_is_refused(
    teacher: str, wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = backend_torch.read_spec(teacher)
    spec = HeadSpec(**({"vocab_size": 32, "softcap": own.softcap, "scale": own.scale} | wrong))  # pyright: ignore
    monkeypatch.setattr(backend_torch, "read_spec", lambda model: spec)
    with pytest.raises(ValueError, match="log-probs differ from the model's own forward pass"):
        TorchBackend(teacher, CONFIG)


def test_a_teacher_too_large_for_the_memory_is_said_not_to_be_compared(
    teacher: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = served(TorchBackend(teacher, CONFIG), spec=HeadSpec(vocab_size=32, scale=9.0))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10))
    backend_vllm._require_own_forward(wrong, teacher)
    assert "not compared with transformers on the CPU" in capsys.readouterr().err


def test_the_text_of_the_comparison_is_made_of_tokens_that_differ(teacher: str) -> None:
    assert len(set(probe_text(teacher))) > 4
