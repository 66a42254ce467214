"""What is handed over, exported and masked has the names, shapes and bits of the checkpoint."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from opd.checkpoint.tensors import open_checkpoint
from opd.config.adapter import LoraConfig
from opd.mask.file import Origin
from opd.mask.mask import Mask
from opd.train.checkpoint_layout import layer_key, stored_buffers
from opd.train.parameter_mask import RestoredTraining, SparseTraining
from opd.train.weights import (
    checkpoint_layout,
    checkpoint_views,
    export,
    full_weights,
    named_weights,
    with_lora,
)

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
GROUPS: dict[str, Any] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "phi3": {"pad_token_id": 0},
    "qwen3_moe": EXPERTS | {"num_experts": 4, "tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": EXPERTS | GROUPS | DEEPSEEK | {"n_routed_experts": 4},
    "glm4_moe": EXPERTS | GROUPS | {"n_routed_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {},
}
FUSED = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe")


def saved(family: str, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model as transformers loads it, and what its file holds."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[family](**(SIZES | FAMILIES[family])), dtype=torch.float32
    )
    for _, buffer in stored_buffers(model):
        buffer.copy_(torch.randn_like(buffer))
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loaded, load_file(folder / "model.safetensors")


class Tokenizer:
    """Leaves nothing."""

    def save_pretrained(self, folder: Path) -> None: ...


def handed_over(model: Any) -> dict[str, torch.Tensor]:
    return dict(full_weights(model, lambda parameters: nullcontext()))


def require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_handed_over_is_the_file(family: str, tmp_path: Path) -> None:
    model, file = saved(family, tmp_path)
    require_equal(handed_over(model), file)
    assert any(n not in file for n, _ in named_weights(model)) == (family in FUSED)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_loads_as_the_same_model(family: str, tmp_path: Path) -> None:
    model, file = saved(family, tmp_path / "base")

    export(handed_over(model).items(), model, Tokenizer(), tmp_path / "final")
    require_equal(load_file(tmp_path / "final" / "model.safetensors"), file)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    ids = torch.arange(20)[None] % 32
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, again.eval()(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_into_the_views_writes_into_the_model(family: str, tmp_path: Path) -> None:
    model, file = saved(family, tmp_path)
    views = checkpoint_views(model)
    require_equal(views, file)
    changed = {name: torch.randn_like(tensor) for name, tensor in file.items()}
    with torch.no_grad():
        for name, view in views.items():
            view.copy_(changed[name])
    require_equal(handed_over(model), changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_are_read_in_the_order_of_memory(family: str, tmp_path: Path) -> None:
    model, _ = saved(family, tmp_path)
    base = checkpoint_layout(model).base(open_checkpoint(str(tmp_path)))
    for name, parameter in named_weights(model):
        assert base[name].shape == tuple(parameter.shape)
        assert torch.equal(base[name].read(), parameter.detach()), name


@pytest.mark.parametrize("training", [SparseTraining, RestoredTraining])
def test_a_mask_of_files_without_the_prefix_of_the_base_model_fits(
    training: Any, tmp_path: Path
) -> None:
    """GPT-2 on the Hub; its causal masks are stored as well."""
    _, file = saved("gpt2", tmp_path)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in file.items()}
    save_file(bare | {"h.0.attn.bias": torch.ones(8, 8)}, tmp_path / "model.safetensors")
    base = open_checkpoint(str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stored = {name: base[name].read() for name in base.parameters}
    require_equal(handed_over(model), stored)
    training(model, random_mask(model, stored))
    layout = checkpoint_layout(model).base(base)
    assert all(torch.equal(layout[n].read(), p.detach()) for n, p in named_weights(model))


@pytest.mark.parametrize(
    ("own", "learned", "expected"),
    [(2, [2], 2), (None, [1], [1]), (2, [1, 2], [2, 1]), ([2, 3], [3, 5], [2, 3, 5]), (2, [], 2)],
)
def test_an_export_ends_where_the_student_learned_to_end(
    own: Any, learned: list[int], expected: Any, tmp_path: Path
) -> None:
    model, _ = saved("llama", tmp_path / "base")
    model.generation_config.eos_token_id = own
    folder = tmp_path / "final"
    export(handed_over(model).items(), model, Tokenizer(), folder, stop_ids=learned)
    assert GenerationConfig.from_pretrained(folder).eos_token_id == expected
    assert model.generation_config.eos_token_id == own


def random_mask(model: Any, file: dict[str, torch.Tensor]) -> Mask:
    """30 % of most parameters, nothing of one and all of another."""
    file = {name: t for name, t in file.items() if name not in dict(stored_buffers(model))}
    kept = {n: (torch.rand(t.numel()) < 0.3).nonzero()[:, 0].int() for n, t in file.items()}
    first, second, *_ = sorted(file)
    kept[first] = kept[first][:0]
    kept[second] = torch.arange(file[second].numel(), dtype=torch.int32)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    return Mask(indices=kept, shapes=shapes, origin=Origin(rule="x", base="", model="x"))


class OneProcess:
    """What write_back needs of an engine."""

    def gathered(self, parameters: Any) -> Any:
        return nullcontext()

    def parts(self, parameter: torch.nn.Parameter) -> list[tuple[torch.Tensor, int]]:
        return [(parameter.data.view(-1), 0)]

    def rewrite(self, parameter: torch.nn.Parameter, change: Any) -> None:
        parameter.data.copy_(change(parameter.data))


@pytest.mark.parametrize("training", [SparseTraining, RestoredTraining])
@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_what_a_mask_of_the_file_keeps_is_trained(
    family: str, training: Any, tmp_path: Path
) -> None:
    model, file = saved(family, tmp_path)
    mask = random_mask(model, file)
    parameter_mask = training(model, mask)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:  # a step that changes every trained coordinate
        with torch.no_grad():
            parameter.add_(1.0)
    parameter_mask.write_back(OneProcess())
    buffers = dict(stored_buffers(model))
    for name, tensor in handed_over(model).items():
        moved = (tensor != file[name]).flatten().nonzero()[:, 0]
        expected = mask.indices[name].long() if name not in buffers else moved[:0]
        assert torch.equal(moved, expected), name


def test_a_mask_of_another_family_is_refused(tmp_path: Path) -> None:
    model, _ = saved("qwen3_moe", tmp_path / "one")
    another, other = saved("mixtral", tmp_path / "other")
    with pytest.raises(ValueError, match="the mask does not fit the model"):
        SparseTraining(model, random_mask(another, other))


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", "embed_tokens,q_proj"),
        ("phi3", "qkv_proj"),
        ("mixtral", "q_proj,gate"),
    ],
)
def test_an_export_is_what_the_adapters_were_trained_to(
    family: str, targets: str, tmp_path: Path
) -> None:
    plain, file = saved(family, tmp_path)
    adapted: Any = with_lora(plain, LoraConfig(r=2, target_modules=targets))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    found = handed_over(adapted)
    assert found.keys() == file.keys()
    assert any(not torch.equal(found[name], file[name]) for name in file)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for name, view in checkpoint_views(merged).items():
            view.copy_(found[name])
        ids = torch.arange(20)[None] % 32
        torch.testing.assert_close(
            adapted.eval()(ids).logits, merged.eval()(ids).logits, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss"])
def test_adapters_of_experts_and_stored_buffers_are_exported(family: str, tmp_path: Path) -> None:
    plain, file = saved(family, tmp_path)
    adapted: Any = with_lora(plain, LoraConfig(r=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    found = handed_over(adapted)
    assert found.keys() == file.keys()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(20)[None] % 32
    with torch.no_grad():
        for name, view in checkpoint_views(merged).items():
            view.copy_(found[name])
        trained = adapted.eval()(ids).logits
        torch.testing.assert_close(trained, merged.eval()(ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "model.layers.3"),
        ("model.layers.3.mlp.experts.7.w1.weight", "model.layers.3"),
        ("transformer.h.0.attn.c_attn.weight", "transformer.h.0"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_weights_of_a_layer_are_gathered_together(name: str, key: str) -> None:
    assert layer_key(name) == key
