"""Heads are measured on the model's own code, and log-probs that differ from its own are refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from opd.head import HeadSpec
from opd.model_head import decoder, head_spec, skeleton
from opd.reference import BOUND, OwnForward, load_whole, reference_logps, use_faithful_attention
from opd.train.own_forward import require_learner_forward
from opd.train.student import Student, TeacherHeads
from opd.train.weights import disable_dropout

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
LLAMA_LIKE = {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE | {"final_logit_softcapping": 3.0},
    "granite": LLAMA_LIKE | {"logits_scaling": 13.0},
    "cohere": LLAMA_LIKE | {"logit_scale": 0.0625},
    "hyperclovax": LLAMA_LIKE | {"logits_scaling": 0.125},
    "falcon_h1": LLAMA_LIKE | MAMBA | {"lm_head_multiplier": 0.04},
    "recurrent_gemma": LLAMA_LIKE | {"lru_width": 32, "logits_soft_cap": 2.0},
    "gpt_oss": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": LLAMA_LIKE
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 48},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 2, "n_layers": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt_projected": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "lfm2": LLAMA_LIKE,
}
KNOWN = {
    "llama": (None, 1.0),
    "gemma2": (3.0, 1.0),
    "granite": (None, 1 / 13),
    "cohere": (None, 0.0625),
    "hyperclovax": (None, 0.125),
    "falcon_h1": (None, 0.04),
    "recurrent_gemma": (2.0, 1.0),
    "gpt2": (None, 1.0),
}


def config_of(family: str, **settings: Any) -> Any:
    kind = family.removesuffix("_projected")
    return CONFIG_MAPPING[kind](**(SIZES | FAMILIES[family] | settings))


def model_of(config: Any) -> Any:
    """Large random weights: far from uniform, so that a wrong factor shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def learner_of(model: Any, spec: HeadSpec) -> Student:
    heads = TeacherHeads(None, 1, torch.device("cpu"))
    return Student(model, spec=spec, temperature=0.7, chunk_bytes=1 << 10, teacher_head=heads)


def gap(model: Any, spec: HeadSpec, own: OwnForward | None = None) -> float:
    """``own`` is the model's own forward pass as it was loaded, by default as it is now."""
    own = own or OwnForward.of(model, range(3, 20))
    return require_learner_forward(learner_of(model, spec).train(), own, pad_id=0, who="it")


@pytest.mark.parametrize(("family", "expected"), KNOWN.items())
def test_the_head_is_what_the_models_own_code_does(
    family: str, expected: tuple[float | None, float]
) -> None:
    spec = head_spec(config_of(family))
    assert spec.vocab_size == 32
    assert (spec.softcap or 0.0, spec.scale) == pytest.approx(
        (expected[0] or 0.0, expected[1]), rel=1e-6
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_learner_computes_every_family_as_transformers_does(family: str) -> None:
    model = model_of(config_of(family))
    use_faithful_attention(model, range(16))
    disable_dropout(model)
    assert gap(model, head_spec(model.config)) <= BOUND[torch.float32]


@pytest.mark.parametrize(
    "wrong", [{"scale": 1.02}, {"scale": 0.5}, {"softcap": 5.0}, {"softcap": 2.0, "scale": 0.9}]
)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_a_wrong_scale_or_cap_is_refused(family: str, wrong: dict[str, float]) -> None:
    model = model_of(config_of(family))
    disable_dropout(model)
    spec = head_spec(model.config)
    changed = {**wrong, "scale": wrong.get("scale", 1.0) * spec.scale}
    with pytest.raises(
        ValueError, match=r"^it: log-probs differ from the model's own forward pass"
    ):
        gap(model, replace(spec, **changed))


def test_a_missing_norm_is_refused() -> None:
    """The learner applies the head to hidden states that the model normalises once more."""
    model = model_of(config_of("llama"))

    class Renormalised(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.5 / out.logits.std(-1, keepdim=True)
            return out

    model.__class__ = Renormalised
    with pytest.raises(ValueError, match="differ from the model's own forward pass"):
        gap(model, HeadSpec(vocab_size=32))


def test_padding_that_reaches_other_tokens_is_refused() -> None:
    model = model_of(config_of("llama"))
    layers, forward = model.model.layers, model.model.layers[1].forward

    def leaking(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(hidden_states, *args, **kwargs)
        return out + 0.1 * hidden_states.mean(1, keepdim=True)

    layers[1].forward = leaking
    with pytest.raises(ValueError, match="differ from the model's own forward pass"):
        gap(model, HeadSpec(vocab_size=32))


def test_attention_that_drops_the_models_cap_is_replaced_or_refused() -> None:
    config = config_of("gemma2", attn_logit_softcapping=0.5)
    config._attn_implementation = "sdpa"
    chosen = model_of(config)
    assert use_faithful_attention(chosen, range(16)) == "eager"
    spec = head_spec(config)
    assert gap(chosen, spec) <= BOUND[torch.float32]
    config._attn_implementation = "sdpa"
    kept = model_of(config)
    with pytest.raises(ValueError, match=r"attention 'sdpa'.*attn_implementation=eager"):
        gap(kept, spec)
    same = model_of(config_of("llama"))
    assert use_faithful_attention(same, range(16)) == same.config._attn_implementation == "sdpa"
    config._attn_implementation = "sdpa"
    halves = model_of(config).to(torch.bfloat16)
    assert use_faithful_attention(halves, range(16)) == "eager"


def test_a_head_that_is_no_scale_and_no_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def squared(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits.sign() * out.logits.square()
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", squared)
    with pytest.raises(ValueError, match="no matrix product with a scale and a soft cap"):
        head_spec(config_of("llama"))


def test_a_head_with_a_bias_and_an_unknown_attention_are_named() -> None:
    phi = CONFIG_MAPPING["phi"](**SIZES, intermediate_size=48)
    with pytest.raises(ValueError, match="no output head or one with a bias"):
        head_spec(phi)
    with pytest.raises(ValueError, match=r"type llama.*sdpaa"):
        skeleton(config_of("llama"), attn_implementation="sdpaa")
    with pytest.raises(ValueError, match="has no base model below its output head"):
        decoder(decoder(model_of(config_of("llama"))))


@pytest.mark.parametrize(
    ("family", "rates"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}),
        ("opt", {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("granite", {"attention_dropout": 0.5}),
    ],
)
def test_training_mode_computes_the_same_model_without_dropout(
    family: str, rates: dict[str, float]
) -> None:
    model = model_of(config_of(family, **rates))
    spec = head_spec(model.config)
    with pytest.raises(ValueError, match="differ from the model's own forward pass"):
        gap(model, spec)
    disable_dropout(model)
    assert gap(model, spec) <= BOUND[torch.float32]
    assert model.training


def test_dropout_of_adapters_is_disabled_too() -> None:
    layer = nn.ModuleDict({"lora_dropout": nn.Dropout(0.3)})
    disable_dropout(layer)
    x = torch.ones(100)
    assert torch.equal(layer.train()["lora_dropout"](x), x)


def test_the_reference_leaves_the_model_as_it_was() -> None:
    model = model_of(config_of("llama"))
    model.train()
    import numpy as np

    logps = reference_logps(model, np.arange(3, 9))
    assert logps.shape == (5, 32)
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(5))
    assert model.training
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dropped", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_files_that_lack_a_tensor_are_refused(tmp_path: Path, dropped: str) -> None:
    model_of(config_of("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[dropped]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"it: its files lack 1 tensors .* the first is {dropped}"
    ):
        load_whole(str(tmp_path), "it", dtype=torch.float32)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    model_of(config_of("llama")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"it.*(model.norm.weight|size mismatch|shape)"):
        load_whole(str(tmp_path), "it", dtype=torch.float32)


def test_whole_files_are_accepted_with_a_tied_head(tmp_path: Path) -> None:
    model_of(config_of("llama", tie_word_embeddings=True)).save_pretrained(tmp_path)
    load_whole(str(tmp_path), "it", dtype=torch.float32)


@pytest.mark.parametrize("rates", [{"router_jitter_noise": 0.5}, {"input_jitter_noise": 0.5}])
def test_a_router_with_noise_trains_as_it_evaluates(rates: dict[str, float]) -> None:
    """PhiMoE routes by its jitter rate in evaluation too: without it, it is another model."""
    config = CONFIG_MAPPING["phimoe"](
        **SIZES, **LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, **rates
    )
    model = model_of(config)
    own = OwnForward.of(model, range(3, 20))
    with pytest.raises(ValueError, match="noise in training"):
        gap(model, head_spec(model.config), own)
    disable_dropout(model)
    assert gap(model.train(), head_spec(model.config), own) <= BOUND[torch.float32]
