"""Models whose experts are stacked in one checkpoint and apart in the other are compared whole."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from opd.analysis.pair import pair_checkpoints
from opd.analysis.walk import AnalysisInputs, measure_checkpoints
from tests.unit.checkpoint.models import Tensors, configured, saved, written

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 12},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "phimoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
}


def in_memory(folder: Path) -> Tensors:
    """The tensors under the names that transformers uses in memory."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(tensors: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 1e-3 * torch.randn(t.shape, generator=generator) for n, t in tensors.items()}


@pytest.fixture(params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A base as files hold it, and the same model moved, as memory holds it."""
    base, trained = tmp_path / "base", tmp_path / "trained"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(request.param, base, **FAMILIES[request.param])
        written(trained, moved(in_memory(base)))
    (trained / "config.json").write_bytes((base / "config.json").read_bytes())
    return base, trained


@pytest.mark.parametrize("is_swapped", [False, True])
def test_every_tensor_of_both_is_compared(
    models: tuple[Path, Path], tmp_path: Path, is_swapped: bool
) -> None:
    base, trained = models[::-1] if is_swapped else models
    inputs = AnalysisInputs(base=str(base), trained=str(trained))
    rows = measure_checkpoints(inputs, tmp_path / "out")
    assert [row["name"] for row in rows if row["status"] != "ok"] == []
    stored = [row for row in rows if row["part_of"] is None]
    assert sum(row["numel"] for row in stored) == sum(t.numel() for t in in_memory(base).values())
    energy = sum(row["stored"]["energy"] for row in stored)
    before, after = in_memory(models[0]), in_memory(models[1])
    expected = sum(float(((after[n] - before[n]).double() ** 2).sum()) for n in before)
    assert energy == pytest.approx(expected, rel=1e-4)


def test_a_pair_stored_alike_is_compared_whole(models: tuple[Path, Path]) -> None:
    for model in models:
        pairs = pair_checkpoints(str(model), str(model))
        assert all(not pair.reason for pair in pairs)


def test_a_folder_without_a_config_is_read_as_the_other(models: tuple[Path, Path]) -> None:
    (models[1] / "config.json").unlink()
    assert all(not pair.reason for pair in pair_checkpoints(str(models[0]), str(models[1])))


def test_what_is_in_one_model_only_is_named(tmp_path: Path) -> None:
    tensors = saved("mixtral", tmp_path / "base", **FAMILIES["mixtral"])
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    written(tmp_path / "trained", {n: t for n, t in tensors.items() if n != name})
    configured(tmp_path / "trained", model_type="mixtral")
    pairs = pair_checkpoints(str(tmp_path / "base"), str(tmp_path / "trained"))
    left = [(pair.name, pair.reason) for pair in pairs if pair.reason]
    assert left == [("model.layers.1.mlp.experts.2.w1.weight", "only in the base")]


ODD = {
    "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(4),
    "model.position_ids": torch.arange(4)[None],
    "model.empty.weight": torch.zeros(0, 4),
    "model.scalar": torch.tensor(1.5),
    "model.flag": torch.tensor([True, False]),
    "model.complex": torch.zeros(2, dtype=torch.complex64),
    "model.wide.weight": torch.randn(3, 4, 2, dtype=torch.float64),
}


def test_buffers_integers_and_empty_tensors_are_handled(tmp_path: Path) -> None:
    base = written(tmp_path / "a", ODD)
    trained = written(
        tmp_path / "b", {n: t + t if t.dtype.is_floating_point else t for n, t in ODD.items()}
    )
    rows = measure_checkpoints(
        AnalysisInputs(base=str(base), trained=str(trained)), tmp_path / "out"
    )
    status = {row["name"].removeprefix("model."): row["status"] for row in rows}
    assert {name for name, found in status.items() if found == "ok"} == {
        "layers.0.mlp.gate.e_score_correction_bias",
        "scalar",
        "wide.weight",
    }
    assert status["empty.weight"] == "empty"
    assert status["flag"] == "no floating-point numbers (bool, bool)"


@pytest.mark.parametrize("is_swapped", [False, True])
def test_a_head_of_its_own_is_compared_with_the_embedding_that_the_other_ties(
    tmp_path: Path, is_swapped: bool
) -> None:
    tensors = saved("llama", tmp_path / "base", tie_word_embeddings=True)
    head = tensors["model.embed_tokens.weight"] + 0.5
    written(tmp_path / "trained", tensors | {"lm_head.weight": head})
    configured(tmp_path / "trained", model_type="llama", tie_word_embeddings=False)
    folders = [str(tmp_path / "base"), str(tmp_path / "trained")]
    pairs = {
        pair.name: pair for pair in pair_checkpoints(*(folders[::-1] if is_swapped else folders))
    }
    assert not any(pair.reason for pair in pairs.values())
    found = pairs["lm_head.weight"]
    assert found.base is not None
    assert found.trained is not None
    sign = -1 if is_swapped else 1
    assert torch.allclose(found.trained.read() - found.base.read(), torch.tensor(sign * 0.5))
