"""The output head: hidden states into log-probs, in float32, a chunk of tokens at a time."""

from dataclasses import dataclass
from typing import Any

import torch

CHUNK_BYTES = 256 << 20  # of one float32 [C, V] tensor; a handful of them live at once


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What stands between ``hidden @ weight.T`` and the softmax.

    ``vocab_size``: ids from here on are padding rows of the matrix and get no probability.
    ``softcap`` s: logits become s tanh(logits / s). ``scale`` multiplies the logits.
    """

    vocab_size: int
    softcap: float | None = None
    scale: float = 1.0


def head_spec(config: Any, vocab_size: int | None = None) -> HeadSpec:
    """Read a Hugging Face config: Gemma's soft cap, Granite's and Cohere's scales."""
    text = config.get_text_config().to_dict()
    divisor = text.get("logits_scaling") or 1.0
    return HeadSpec(
        vocab_size=vocab_size or text["vocab_size"],
        softcap=text.get("final_logit_softcapping"),
        scale=(text.get("logit_scale") or 1.0) / divisor,
    )


def head_logps(
    hidden_CD: torch.Tensor, weight_VD: torch.Tensor, spec: HeadSpec, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probs [C, spec.vocab_size], float32, of softmax(logits / temperature).

    The product runs in the operands' common dtype (float32 when either is), the softmax in float32.
    """
    dtype = torch.promote_types(hidden_CD.dtype, weight_VD.dtype)
    weight = weight_VD[: spec.vocab_size].to(dtype)
    logits = torch.nn.functional.linear(hidden_CD.to(dtype), weight).float()
    if spec.scale != 1.0:
        logits = logits * spec.scale
    if spec.softcap is not None:
        logits = spec.softcap * torch.tanh(logits / spec.softcap)
    return torch.log_softmax(logits / temperature if temperature != 1.0 else logits, dim=-1)


def chunk_rows(vocab_size: int, budget_bytes: int = CHUNK_BYTES) -> int:
    """How many tokens' float32 log-probs over ``vocab_size`` ids fit into ``budget_bytes``; at least 1."""
    return max(1, budget_bytes // (4 * vocab_size))
