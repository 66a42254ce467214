"""The parts of a transformers model that losses in chunks need: its decoder, and its head, measured.

Nothing here knows a family of models: the head is what the model's own code does to hidden states.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.generic import ModelOutput

from opd.head import HeadSpec

PROBES = 8
"""Output rows of the head that is measured."""


def read_model_config(
    model: str, *, setting: str = "model", trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The config of a model folder or hub id, which ``setting`` names in errors.

    Raises ValueError when there is none, and when transformers refuses a value in it.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        require_sizes(config)
    except Exception as error:  # each family of models refuses its settings in its own way
        raise unreadable_model(setting, model, error) from None
    return config


def unreadable_model(setting: str, model: str, error: Exception) -> ValueError:
    """The error for a model whose files a library cannot read."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"{setting}={model} cannot be read as a model folder or hub id ({reason})")


def require_sizes(config: PreTrainedConfig) -> None:
    """ValueError unless a config says how many ids its text model has."""
    text: Any = config.get_text_config()
    size = text.vocab_size if isinstance(text, PreTrainedConfig) else None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"vocab_size in its config.json is {size}")


def decoder(causal: Any) -> nn.Module:
    """The model below the output head, whose last hidden state the head is applied to.

    Raises ValueError for a model that transformers does not split in two.
    """
    base = causal.base_model
    if base is causal:
        raise ValueError(
            f"{type(causal).__name__} has no base model below its output head, which is needed to apply "
            "the head in chunks: choose a causal language model of transformers"
        )
    return base


def skeleton(
    config: PreTrainedConfig,
    *,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The causal language model of a config without storage for its weights.

    Raises ValueError for what transformers cannot build: an unknown architecture or attention, a package
    that is not installed.
    """
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # impossible sizes make constructors fail in many ways
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"transformers cannot build the model of type {config.model_type} ({first})"
        ) from None


def head_width(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """The width of the hidden states that the output head takes."""
    causal = skeleton(config, trust_remote_code=trust_remote_code)
    return causal.get_output_embeddings().in_features


def head_spec(
    config: PreTrainedConfig,
    vocab_size: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> HeadSpec:
    """The scale and soft cap of a model's head, measured on its own code; about 10 ms, no weights.

    A model without storage gets a small random head and known hidden states over eight orders of
    magnitude, so that the logits it makes of them show what it does besides the matrix product.
    ``vocab_size``: as in ``HeadSpec``, by default the config's.

    Raises ValueError for a head with a bias, or one that is no scale and no soft cap.
    """
    causal = skeleton(config, trust_remote_code=trust_remote_code)
    name = type(causal).__name__
    own_head = causal.get_output_embeddings()
    if own_head is None or own_head.bias is not None:
        raise ValueError(
            f"{name} has no output head or one with a bias, which is not supported: choose a causal "
            "language model whose head is a plain matrix"
        )
    width = own_head.in_features
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(width, PROBES, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=random, dtype=torch.float64))
    causal.set_output_embeddings(head)
    unit_ND = torch.randn(64, width, generator=random, dtype=torch.float64) / width
    sizes = torch.logspace(-4, 4, 64, dtype=torch.float64)
    raw, logits = _probe(causal.eval(), head, unit_ND * sizes[:, None])
    softcap, scale = _fit(raw, logits)
    fitted = raw * scale if softcap is None else softcap * torch.tanh(raw * scale / softcap)
    worst = float(((fitted - logits).abs() / (1e-3 + logits.abs())).max())
    if not worst <= 1e-5:
        raise ValueError(
            f"the output head of {name} is no matrix product with a scale and a soft cap (relative "
            f"difference {worst:.2g}), which is all that losses in chunks compute: choose another model"
        )
    return HeadSpec(
        vocab_size=vocab_size or config.get_text_config().vocab_size, softcap=softcap, scale=scale
    )


def _probe(
    causal: Any, head: nn.Linear, hidden_ND: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden @ head, what the model makes of these hidden states), both [N, PROBES]."""
    base = decoder(causal)
    for module in {base, causal.get_decoder()} - {None}:
        module.forward = lambda *args, **kwargs: _Hidden(last_hidden_state=hidden_ND[None])
    tokens = torch.zeros(1, len(hidden_ND), dtype=torch.long)
    with torch.no_grad():
        return head(hidden_ND), causal(input_ids=tokens, use_cache=False).logits[0].double()


@dataclass
class _Hidden(ModelOutput):
    """An output whose other fields (router logits, caches of any kind) are None."""

    last_hidden_state: torch.Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _fit(raw: torch.Tensor, logits: torch.Tensor) -> tuple[float | None, float]:
    """(soft cap or None, scale) such that logits are close to cap tanh(raw scale / cap)."""
    small = raw.abs() < 1e-3
    scale = _rounded((logits[small] / raw[small]).median())
    linear = (logits - raw * scale).abs() <= 1e-5 * (raw * scale).abs() + 1e-9
    if bool(linear.all()):
        return None, scale
    return _rounded(logits.abs().max()), scale


def _rounded(value: torch.Tensor) -> float:
    """Seven significant digits: what a model that computes in float32 can show."""
    return float(f"{float(value):.7g}")
