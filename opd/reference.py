"""A transformers model's own forward pass, which every log-prob of ours must agree with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from opd.head import HeadSpec, head_logps
from opd.model_head import decoder
from opd.types import IntArray

TOKENS = 16
"""Length of the longer of two sequences that are compared."""
BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.15}
"""Mean difference in nats by the dtype that computes. Each side of a comparison in bfloat16 is 0.02 to 0.04
from float32 (SmolLM2-135M), and logits near 20 are rounded by up to 0.06."""
MOST_TOKENS = 256
"""Of the text on which rounding is measured."""


def load_whole(model: str, who: str, **options: Any) -> Any:
    """The causal language model of a folder or Hub id, every tensor of it from the files.

    ``options`` go to ``from_pretrained``; ``who`` names the model in errors. Raises ValueError when it
    cannot be loaded, or when the files lack a tensor, which transformers would fill with random numbers.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (ImportError, ValueError, OSError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{who} cannot be loaded ({first})") from error
    causal, found = loaded
    lacking = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if lacking:
        raise ValueError(
            f"{who}: its files lack {len(lacking)} tensors of {type(causal).__name__} or hold them in "
            f"another shape, the first is {lacking[0]}: fetch or export the model again"
        )
    return causal


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


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnForward:
    """Log-probs [T - 1, V] of a model's own forward pass for each of a few sequences, as it was loaded.

    ``dtype`` is the one that computed; ``name`` is its class and ``attention`` the one in use.
    """

    sequences: list[IntArray]
    logps: list[torch.Tensor]
    dtype: torch.dtype
    name: str
    attention: str

    @classmethod
    def of(
        cls, causal: Any, ids: Sequence[int], *, dtype: torch.dtype | None = None
    ) -> "OwnForward":
        """Compute them on two sequences made of ``ids``, in ``dtype`` (by default that of the weights)."""
        sequences = probe_sequences(ids)
        return cls(
            sequences=sequences,
            logps=[reference_logps(causal, each) for each in sequences],
            dtype=dtype or next(causal.parameters()).dtype,
            name=type(causal).__name__,
            attention=causal.config._attn_implementation,
        )

    def require(
        self,
        ours: Callable[[list[IntArray]], list[torch.Tensor]],
        who: str,
        *,
        dtype: torch.dtype | None = None,
    ) -> float:
        """Compare our log-probs with these; the gap in nats.

        ``ours`` maps sequences to log-probs [T - 1, V], computed in ``dtype`` (by default that of
        these); ``who`` names the model in an error. Raises ValueError when the difference is above the
        bound of the dtype.
        """
        bound = BOUND[dtype or self.dtype]
        gap = largest_gap(self.sequences, self.logps, ours(self.sequences))
        if not gap <= bound:
            raise ValueError(
                f"{who}: log-probs differ from the model's own forward pass by {gap:.3g} nats a token, "
                f"allowed is {bound:g}: a head, a norm, an attention, noise in training or padding of "
                f"{self.name} is computed differently here with attention {self.attention!r}; choose "
                "another model, or for a student try student.attn_implementation=eager"
            )
        return gap


def probe_sequences(ids: Sequence[int]) -> list[IntArray]:
    """Two sequences of other lengths out of some token ids, so that one is padded beside the other."""
    long = np.resize(np.asarray(ids, np.int32), TOKENS)
    return [long, long[: TOKENS // 2 + 1]]


def largest_gap(
    sequences: Sequence[IntArray], own: Sequence[torch.Tensor], ours: Sequence[torch.Tensor]
) -> float:
    """The mean over tokens of |our log-prob - the model's own| in nats; the larger of two means.

    One is over the sequences' own next tokens, one over the likeliest. ``own`` and ``ours``: [T - 1, V]
    of each sequence, in the order of ``sequences``; V of ``ours`` may be smaller.
    """
    own_gaps, top_gaps = [], []
    for ids_T, all_TV, our_TV in zip(sequences, own, ours, strict=True):
        own_TV = all_TV[:, : our_TV.shape[1]].log_softmax(-1).to(our_TV.device)
        gap_TV = (our_TV.float() - own_TV).abs()
        target_T1 = torch.from_numpy(ids_T[1:].astype(np.int64))[:, None].to(our_TV.device)
        own_gaps.append(gap_TV.gather(1, target_T1))
        top_gaps.append(gap_TV.gather(1, own_TV.argmax(1, keepdim=True)))
    return max(float(torch.cat(gaps).mean()) for gaps in (own_gaps, top_gaps))


def use_faithful_attention(
    causal: Any, ids: Sequence[int], *, dtype: torch.dtype | None = None
) -> str:
    """Switch to eager attention where the one in use computes another model; the name of the one used.

    SDPA leaves out soft caps of attention logits, for example. The difference is measured on a few tokens
    where ``dtype``, which computes (by default that of the weights), is float32; it drowns in the rounding
    of others, where a soft cap in the config decides.
    """
    attention = causal.config._attn_implementation
    text = causal.config.get_text_config().to_dict()
    if attention == "eager":
        return attention
    if (dtype or next(causal.parameters()).dtype) == torch.float32:
        differs = _attention_gap(causal, ids) > BOUND[torch.float32]
    else:
        differs = attention == "sdpa" and bool(text.get("attn_logit_softcapping"))
    if differs:
        _set_attention(causal, "eager")
    return causal.config._attn_implementation


def _attention_gap(causal: Any, ids: Sequence[int]) -> float:
    """Mean difference in nats between the attention in use and eager attention, of one sequence."""
    ids_T = probe_sequences(ids)[0]
    return largest_gap([ids_T], [reference_logps(causal, ids_T)], [_own_logps(causal, ids_T)])


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
        # a cache of cast weights would be a second copy of the model
        cast = torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
        with torch.no_grad(), cast:
            hidden_TD = decoder(causal)(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
            logp_TV = head_logps(hidden_TD[:-1].float(), head_VD, spec)
        logps.append(logp_TV.gather(1, target_N1.to(device)))
    causal.train(training)
    return float((logps[0] - logps[1]).abs().mean())
