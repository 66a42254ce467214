"""A mask is over parameters: buffers, integers and tensors that are not loaded are no part of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from opd.checkpoint.tensors import open_checkpoint
from opd.config.mask import MaskRule, RuleConfig
from opd.mask.compare import compare
from tests.unit.analysis.test_experts import FAMILIES
from tests.unit.checkpoint.models import configured, loaded, saved, written
from tests.unit.mask.models import discovered

LEFTOVERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    "model.layers.2.eh_proj.weight": torch.randn(16, 32),
    "model.position_ids": torch.arange(8)[None],
}
CASES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 1},
    "deepseek_v3": FAMILIES["deepseek_v3"],
    "mixtral": FAMILIES["mixtral"],
}


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.filterwarnings("ignore")
def test_a_mask_covers_the_parameters_that_transformers_loads(tmp_path: Path, kind: str) -> None:
    tensors = saved(kind, tmp_path / "base", **CASES[kind])
    written(tmp_path / "base", tensors | LEFTOVERS)
    mask, summary = discovered(
        tmp_path / "base", RuleConfig(rule=MaskRule.near_zero, density=0.1), tmp_path / "m"
    )
    model: Any = loaded(tmp_path / "base")
    total = sum(parameter.numel() for parameter in model.parameters())
    assert summary.numel == sum(mask.numel(name) for name in mask.shapes) == total
    assert summary.kept == round(total / 10)
    buffers = {name for name in tensors if name.endswith("e_score_correction_bias")}
    assert set(mask.shapes) == set(tensors) - buffers
    assert f"{3 + len(buffers)} stored tensors are no parameters" in summary.warnings[-1]


@pytest.mark.filterwarnings("ignore")
def test_rules_over_a_trained_model_compare_parameters(tmp_path: Path) -> None:
    tensors = saved("deepseek_v3", tmp_path / "base", **FAMILIES["deepseek_v3"])
    trained = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in tensors.items()}
    saved("deepseek_v3", tmp_path / "trained", **FAMILIES["deepseek_v3"])
    written(tmp_path / "trained", trained | LEFTOVERS)
    base = tmp_path / "base"
    rule = RuleConfig(rule=MaskRule.delta, density=0.1, trained=str(tmp_path / "trained"))
    mask, _ = discovered(base, rule, tmp_path / "m")
    like = RuleConfig(rule=MaskRule.magnitude_matched, like=str(tmp_path / "m"))
    matched, _ = discovered(base, like, tmp_path / "n")
    assert mask.counts() == matched.counts()
    found = compare(mask, matched, open_checkpoint(str(base)))
    assert found.whole.a == found.whole.b


def test_a_model_that_transformers_does_not_know_is_taken_as_stored(tmp_path: Path) -> None:
    tensors = {"some.weight": torch.randn(8, 4), "other.bias": torch.randn(4)}
    for kind in ("unheard_of", "llama"):
        configured(tmp_path, model_type=kind)
        written(tmp_path, tensors | {"steps": torch.arange(3)})
        assert set(open_checkpoint(str(tmp_path)).parameters) == set(tensors)
