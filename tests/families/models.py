"""Tiny random models of the families that people train: two layers, hidden size 64, few tokens."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from opd.train.checkpoint_layout import stored_buffers

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}
DEEPSEEK: dict[str, Any] = {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 64,
    "num_key_value_heads": 2,
}
MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
}
ATTENTION_AND_LINEAR = ["linear_attention", "full_attention"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiny:
    """A tiny model: ``kind`` is the model_type of transformers; ``settings`` are those of its config.

    ``overrides`` are of the recipe. ``refused`` says why a family is not trained under vLLM on a CPU, and
    ``error`` is a part of the sentence that refuses it.
    """

    kind: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    refused: str = ""
    error: str = ""


def tiny(kind: str, title: str, **settings: Any) -> Tiny:
    return Tiny(kind=kind, title=title, settings=settings)


def refused(family: Tiny, error: str, reason: str) -> Tiny:
    return replace(family, error=error, refused=reason)


FAMILIES: dict[str, Tiny] = {
    "llama": tiny("llama", "Llama 3", tie_word_embeddings=False),
    "llama_tied": tiny("llama", "Llama 3.2 (tied head)", tie_word_embeddings=True),
    "qwen2": tiny("qwen2", "Qwen2, Qwen2.5"),
    "qwen3": tiny("qwen3", "Qwen3"),
    "mistral": tiny("mistral", "Mistral"),
    "ministral3": tiny("ministral3", "Ministral 3"),
    "gemma": tiny("gemma", "Gemma 1"),
    "gemma2": tiny("gemma2", "Gemma 2", query_pre_attn_scalar=32, sliding_window=16),
    "gemma3": tiny(
        "gemma3_text",
        "Gemma 3",
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma4": tiny(
        "gemma4_text",
        "Gemma 4",
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=32,
        hidden_size_per_layer_input=16,
        global_head_dim=32,
    ),
    "phi": refused(
        tiny("phi", "Phi 1, Phi 2", num_key_value_heads=2),
        "no output head or one with a bias",
        "its output head has a bias, and losses in chunks apply a plain matrix",
    ),
    "phi3": tiny("phi3", "Phi-3, Phi-4"),
    "phi4_mini": tiny(
        "phi3",
        "Phi-4-mini (partial rotary, tied head)",
        tie_word_embeddings=True,
        partial_rotary_factor=0.75,
    ),
    "phimoe": refused(
        tiny("phimoe", "Phi-3.5-MoE", num_local_experts=4, num_experts_per_tok=2),
        "cannot complete a prompt",
        "vLLM serves it by transformers' module, starts, and cannot complete a prompt",
    ),
    "granite": tiny("granite", "Granite 3", logits_scaling=8.0, residual_multiplier=0.5),
    "granite_moe": tiny("granitemoe", "Granite 3 MoE", num_local_experts=4, num_experts_per_tok=2),
    "granite_hybrid": tiny(
        "granitemoehybrid",
        "Granite 4-H",
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=48,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        layer_types=["mamba", "attention"],
    ),
    "glm": tiny("glm", "GLM-4 9B (0414 and before)", partial_rotary_factor=0.5),
    "glm4": tiny("glm4", "GLM-4", partial_rotary_factor=0.5),
    "glm4_moe": tiny(
        "glm4_moe",
        "GLM-4.5, 4.6",
        **EXPERTS,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    ),
    "cohere": tiny("cohere", "Cohere Command R"),
    "cohere2": tiny("cohere2", "Cohere Command R7B, A", sliding_window=128),
    "cohere2_window": refused(
        tiny("cohere2", "Cohere Command R7B, A beyond its window", sliding_window=8),
        "differ from",
        "beyond the sliding window vLLM attends to one token more than transformers",
    ),
    "olmo2": tiny("olmo2", "OLMo 2"),
    "olmo3": tiny("olmo3", "OLMo 3", sliding_window=16),
    "olmoe": tiny("olmoe", "OLMoE", num_experts=4, num_experts_per_tok=2),
    "smollm3": tiny("smollm3", "SmolLM3"),
    "starcoder2": tiny("starcoder2", "StarCoder 2"),
    "gpt_neox": tiny("gpt_neox", "GPT-NeoX, Pythia", num_key_value_heads=2),
    "seed_oss": tiny("seed_oss", "Seed-OSS"),
    "arcee": tiny("arcee", "Arcee"),
    "hunyuan": tiny("hunyuan_v1_dense", "Hunyuan dense"),
    "exaone4": tiny("exaone4", "EXAONE 4", sliding_window=16, sliding_window_pattern=2),
    "ernie": tiny("ernie4_5", "ERNIE 4.5"),
    "ernie_moe": tiny(
        "ernie4_5_moe",
        "ERNIE 4.5 MoE",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=48,
        moe_layer_start_index=0,
        moe_layer_end_index=1,
        moe_num_shared_experts=1,
    ),
    "nemotron": tiny("nemotron", "Nemotron 4, Minitron"),
    "nemotron_h": tiny(
        "nemotron_h",
        "Nemotron-H, Nemotron 3",
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
    ),
    "mixtral": tiny("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": tiny(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-MoE",
        **EXPERTS,
        num_experts=4,
        shared_expert_intermediate_size=48,
    ),
    "qwen3_moe": tiny("qwen3_moe", "Qwen3-MoE", **EXPERTS, num_experts=4),
    "deepseek_v2": tiny("deepseek_v2", "DeepSeek V2", **EXPERTS, **DEEPSEEK, topk_method="greedy"),
    "deepseek_v3": tiny(
        "deepseek_v3",
        "DeepSeek V3, Kimi K2, Moonlight",
        **EXPERTS,
        **DEEPSEEK,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
    ),
    "gpt_oss": tiny(
        "gpt_oss", "GPT-OSS", num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "qwen3_next": refused(
        tiny(
            "qwen3_next",
            "Qwen3-Next",
            **EXPERTS,
            num_experts=4,
            shared_expert_intermediate_size=48,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=ATTENTION_AND_LINEAR,
        ),
        "CPU GDN attention requires BF16",
        "vLLM's CPU kernel of its linear attention asks for bfloat16, in which it has not been checked",
    ),
    "falcon_h1": tiny("falcon_h1", "Falcon-H1", **MAMBA),
    "lfm2": refused(
        tiny(
            "lfm2",
            "LFM2",
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            conv_dim=64,
            block_dim=64,
        ),
        "differ from",
        "vLLM computes other log-probs than transformers from the same files",
    ),
    "gpt2": tiny("gpt2", "GPT-2", num_key_value_heads=2),
    "gpt2_hub": tiny(
        "gpt2", "GPT-2 as on the Hub (names without `transformer.`)", num_key_value_heads=2
    ),
    "bloom": tiny("bloom", "BLOOM", num_key_value_heads=2),
    "opt": tiny("opt", "OPT", ffn_dim=96, word_embed_proj_dim=64, num_key_value_heads=2),
    "stablelm": tiny("stablelm", "StableLM 2"),
}


DEFAULT = (
    "llama",
    "gemma2",
    "olmo2",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "falcon_h1",
    "cohere2_window",
)
"""One of each kind: plain, head tied to an embedding of vLLM's, transformers' module in vLLM, experts fused
in memory, MLA with a stored buffer, experts written without a loader, hybrid, refused."""

PADDED = {
    "bloom",
    "falcon_h1",
    "gpt_oss",
    "granite_hybrid",
    "lfm2",
    "nemotron_h",
    "opt",
    "qwen3_next",
}
"""Families whose code in transformers does not keep the sequences of a row apart by their positions."""
NO_PLAIN_HEAD = {"phi"}


def build(name: str, folder: Path, tokenizer: Path) -> None:
    """Write the tiny model and its tokenizer into ``folder``."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    model = tiny_family(name, len(words))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    if name == "gpt2_hub":
        _leave_prefix_out(folder / "model.safetensors")


def tiny_family(name: str, vocab_size: int) -> Any:
    """The tiny model, with random weights large enough that a wrong factor shows."""
    family = FAMILIES[name]
    settings = SIZES | family.settings | {"vocab_size": vocab_size}
    config = CONFIG_MAPPING[family.kind](**settings)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
        for _, buffer in stored_buffers(model):
            buffer.copy_(torch.randn_like(buffer) * 0.01)
    return model


def _leave_prefix_out(file: Path) -> None:
    """As GPT-2 lies on the Hub: no prefix of the base model, and the causal masks as buffers."""
    tensors = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    causal = torch.ones(128, 128).tril().view(1, 1, 128, 128)
    save_file(tensors | {"h.0.attn.bias": causal}, file, {"format": "pt"})
