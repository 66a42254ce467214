"""Every family that is held in bf16 for training is checked as sharply as one in float32."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.config.student import StudentConfig
from opd.model_head import head_spec
from opd.reference import BOUND, OwnForward, reference_logps
from opd.train.float32 import float32_layers
from opd.train.loading import load_for_training
from opd.train.own_forward import require_learner_forward
from opd.train.weights import disable_dropout, load_student
from tests.unit.test_reference import FAMILIES, config_of, learner_of, model_of

PROBE = range(3, 20)


def held_in_bf16(family: str, folder: Path) -> tuple[Any, Any]:
    """A family's model as it is trained in bf16, and the same weights in a float32 model."""
    model_of(config_of(family)).bfloat16().save_pretrained(folder)
    config = StudentConfig(model=str(folder))
    held = load_for_training(config.model, config, dtype=torch.bfloat16, partition=None)
    whole = load_student(config.model, config, dtype=torch.float32)
    disable_dropout(held)
    return held, whole


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_in_bf16_is_compared_in_float32(family: str, tmp_path: Path) -> None:
    held, whole = held_in_bf16(family, tmp_path)
    assert {p.dtype for p in held.parameters()} == {torch.bfloat16}
    assert held.config._attn_implementation == whole.config._attn_implementation
    for (name, own), expected in zip(held.named_buffers(), whole.buffers(), strict=True):
        assert own.dtype == expected.dtype, name
        assert torch.equal(own, expected), name
    with float32_layers(held):
        own = OwnForward.of(held, PROBE, dtype=torch.float32)
    exact = reference_logps(whole, own.sequences[0])
    assert float((own.logps[0] - exact).abs().max()) < 1e-5
    student = learner_of(held, head_spec(held.config)).train()
    assert require_learner_forward(student, own, pad_id=0, who="it") <= BOUND[torch.float32]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_that_is_wrong_by_a_thousandth_is_refused_in_bf16(
    family: str, tmp_path: Path
) -> None:
    held, _ = held_in_bf16(family, tmp_path)
    with float32_layers(held):
        own = OwnForward.of(held, PROBE, dtype=torch.float32)
    spec = head_spec(held.config)
    student = learner_of(held, replace(spec, scale=spec.scale * 1.001)).train()
    with pytest.raises(ValueError, match="differ from the model's own forward pass"):
        require_learner_forward(student, own, pad_id=0, who="it")
