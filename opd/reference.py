"""A transformers model's own forward pass, which every log-prob of ours must agree with.

Nothing here knows a family of models: the head is measured, and results are compared.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils.generic import ModelOutput

from opd.head import HeadSpec, head_logps
from opd.types import IntArray

TOKENS = 16
"""Length of the longer of two sequences that are compared."""
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.15}
"""Mean difference in nats by the dtype that computes. Each side of a comparison in bfloat16 is 0.02 to 0.04
from float32 (SmolLM2-135M), and logits near 20 are rounded by up to 0.06."""
MOST_TOKENS = 256
"""Of the text on which rounding is measured."""
PROBES = 8
"""Output rows of the head that is measured."""


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
    except (ImportError, ValueError, AttributeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"transformers cannot build the model of type {config.model_type} ({first})"
        ) from None


def head_spec(
    config: PreTrainedConfig,
    vocab_size: int | None = None,
    *,
    trust_remote_code: bool = False,
) -> HeadSpec:
    """The scale and soft cap of a model's head, measured on its own code; about 10 ms, no weights.

    A model without storage gets a small random head and known hidden states from -1e2 to 1e2, so that the
    logits it makes of them show what it does besides the matrix product. ``vocab_size``: as in
    ``HeadSpec``, by default the config's. Raises ValueError for a head with a bias, or one that is no
    scale and no soft cap.
    """
    causal = skeleton(config, trust_remote_code=trust_remote_code)
    name = type(causal).__name__
    own_head = causal.get_output_embeddings()
    if own_head is None or own_head.bias is not None:
        raise ValueError(
            f"{name} has no output head or one with a bias, which is not supported: choose a causal "
            "language model whose head is a plain matrix"
        )
    width = config.get_text_config().hidden_size
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(own_head.in_features, PROBES, bias=False, dtype=torch.float64)
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


def reference_logps(causal: Any, ids_T: IntArray) -> torch.Tensor:
    """Log-probs [T - 1, V] of every next token by the model's own forward pass, float32.

    One sequence, no padding, evaluation mode, and eager attention where the model can be switched: the
    plain formula, with every cap and sink of the architecture.
    """
    attention = causal.config._attn_implementation
    _set_attention(causal, "eager")
    try:
        return _own_logps(causal, ids_T)
    finally:
        _set_attention(causal, attention)


def _own_logps(causal: Any, ids_T: IntArray) -> torch.Tensor:
    """Log-probs [T - 1, V] by the model as it is, in evaluation mode."""
    training, device = causal.training, next(causal.parameters()).device
    causal.eval()
    try:
        with torch.no_grad():
            ids_1T = torch.from_numpy(ids_T.astype(np.int64))[None].to(device)
            logits_TV = causal(input_ids=ids_1T, use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits_TV.float(), dim=-1)
    finally:
        causal.train(training)


def _set_attention(causal: Any, name: str) -> None:
    if causal.config._attn_implementation != name:
        causal.set_attn_implementation(name)


def probe_sequences(ids: Sequence[int]) -> list[IntArray]:
    """Two sequences of other lengths out of some token ids, so that one is padded beside the other."""
    long = np.resize(np.asarray(ids, np.int32), TOKENS)
    return [long, long[: TOKENS // 2 + 1]]


def largest_gap(causal: Any, sequences: Sequence[IntArray], ours: Sequence[torch.Tensor]) -> float:
    """The mean over tokens of |our log-prob - the model's own| in nats; the larger of two means.

    One is over the sequences' own next tokens, one over the likeliest. ``ours``: [T - 1, V] of each
    sequence, in the order of ``sequences``; V may be smaller than the model's.
    """
    own_gaps, top_gaps = [], []
    for ids_T, our_TV in zip(sequences, ours, strict=True):
        vocab_size = our_TV.shape[1]
        own_TV = reference_logps(causal, ids_T)[:, :vocab_size].log_softmax(-1).to(our_TV.device)
        gap_TV = (our_TV.float() - own_TV).abs()
        target_T1 = torch.from_numpy(ids_T[1:].astype(np.int64))[:, None].to(our_TV.device)
        own_gaps.append(gap_TV.gather(1, target_T1))
        top_gaps.append(gap_TV.gather(1, own_TV.argmax(1, keepdim=True)))
    return max(float(torch.cat(gaps).mean()) for gaps in (own_gaps, top_gaps))


def use_faithful_attention(causal: Any, ids: Sequence[int]) -> str:
    """Switch to eager attention where the one in use computes another model; the name of the one used.

    SDPA leaves out soft caps of attention logits, for example. The difference is measured on a few tokens
    in float32 weights; it drowns in the rounding of others, where a soft cap in the config decides.
    """
    attention = causal.config._attn_implementation
    text = causal.config.get_text_config().to_dict()
    if attention == "eager":
        return attention
    if next(causal.parameters()).dtype == torch.float32:
        differs = _attention_gap(causal, ids) > BOUND[torch.float32]
    else:
        differs = attention == "sdpa" and bool(text.get("attn_logit_softcapping"))
    if differs:
        _set_attention(causal, "eager")
    return causal.config._attn_implementation


def _attention_gap(causal: Any, ids: Sequence[int]) -> float:
    """Mean difference in nats between the attention in use and eager attention, of one sequence."""
    ids_T = probe_sequences(ids)[0]
    return largest_gap(causal, [ids_T], [_own_logps(causal, ids_T)])


def bf16_rounding(causal: Any, ids: Sequence[int], spec: HeadSpec) -> float:
    """Mean difference in nats that bfloat16 layers make to the log-probs of float32 weights.

    Measured on at most ``MOST_TOKENS`` of ``ids``, the head in float32 both times.
    """
    ids_T = np.asarray(ids, np.int64)[:MOST_TOKENS]
    device = next(causal.parameters()).device
    ids_1T, target_N1 = torch.from_numpy(ids_T)[None].to(device), torch.from_numpy(ids_T)[1:, None]
    head_VD = causal.get_output_embeddings().weight
    training = causal.training
    causal.eval()
    logps = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            hidden_TD = decoder(causal)(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
            logp_TV = head_logps(hidden_TD[:-1].float(), head_VD, spec)
        logps.append(logp_TV.gather(1, target_N1.to(device)))
    causal.train(training)
    return float((logps[0] - logps[1]).abs().mean())


def require_own_forward(
    causal: Any,
    ids: Sequence[int],
    ours: Callable[[list[IntArray]], list[torch.Tensor]],
    who: str,
    *,
    dtype: torch.dtype | None = None,
) -> float:
    """Compare our log-probs with the model's own forward pass on a few tokens; the gap in nats.

    ``ours`` maps sequences to log-probs [T - 1, V], computed in ``dtype`` (by default that of the
    weights); ``who`` names the model in an error. Raises ValueError when the difference is above the
    bound of the dtype.
    """
    sequences = probe_sequences(ids)
    bound = BOUND[dtype or next(causal.parameters()).dtype]
    gap = largest_gap(causal, sequences, ours(sequences))
    if not gap <= bound:
        raise ValueError(
            f"{who}: log-probs differ from the model's own forward pass by {gap:.3g} nats a token, allowed "
            f"is {bound:g}: a head, a norm, an attention or padding of {type(causal).__name__} is computed "
            f"differently here with attention {causal.config._attn_implementation!r}; try eager attention "
            "(student.attn_implementation=eager), or choose another model"
        )
    return gap
