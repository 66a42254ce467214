"""From a request to its response: one code path for the server and the local teacher."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from opd.config.student import DType
from opd.head import HeadSpec
from opd.teacher.backend import Backend
from opd.teacher.scoring import ScoreOptions, Scores, score_hidden
from opd.teacher.wire import Want, WireRequest, WireResponse
from opd.types import BFloat16Bits, FloatArray, IntArray, TeacherInfo

TEMPERATURES = (1e-3, 1e6)
"""The range in which logits divided by a temperature stay float32 numbers."""
WIRE_DTYPES = {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}


def require_answerable(request: WireRequest, info: TeacherInfo, spec: HeadSpec) -> None:
    """``ValueError`` when this teacher cannot score the request."""
    longest = int(request.lengths.max())
    if longest > info.max_length:
        raise ValueError(
            f"a sequence has {longest} tokens, teacher {info.model} takes at most {info.max_length}"
        )
    if not 1 <= request.vocab_size <= info.vocab_size:
        raise ValueError(
            f"vocab_size is {request.vocab_size}, must be from 1 to {info.vocab_size}, "
            f"the output rows of teacher {info.model}"
        )
    _require_ids("token_ids", request.token_ids, 0, info.vocab_size)
    _require_ids("scored token_ids", request.targets(), 0, request.vocab_size)
    if request.named_ids is not None:
        _require_ids("named_ids", request.named_ids, -1, request.vocab_size)
    if request.top_k > request.vocab_size:
        raise ValueError(f"top_k is {request.top_k}, more than vocab_size {request.vocab_size}")
    least, most = TEMPERATURES
    if not least <= request.temperature <= most:
        raise ValueError(f"temperature is {request.temperature}, must be from {least} to {most}")
    if request.want is Want.hidden and spec.softcap is not None:
        raise ValueError(f"teacher {info.model} caps its logits: request full_logps, not hidden")


def compute_hidden(backend: Backend, requests: Sequence[WireRequest]) -> list[torch.Tensor]:
    """For each request the hidden states [N, D] that predict its targets, in one backend call.

    The last token of a sequence predicts no target, so it is left out of the forward pass.
    """
    sequences = [sequence for request in requests for sequence in request.sequences()]
    starts = [int(start) for request in requests for start in request.starts]
    states = backend.hidden([sequence[:-1] for sequence in sequences])
    kept = iter(state[start - 1 :] for state, start in zip(states, starts, strict=True))
    return [torch.cat([next(kept) for _ in request.starts]) for request in requests]


def score_request(backend: Backend, request: WireRequest, hidden_ND: torch.Tensor) -> WireResponse:
    """Apply the head to the hidden states of a request; the response holds what it asks for."""
    named = request.named_ids
    options = ScoreOptions(
        top_k=request.top_k,
        named_ids_NK=None if named is None else torch.from_numpy(named.astype(np.int64)),
        full_logps=request.want is Want.full_logps,
        hidden=request.want is Want.hidden,
        hidden_dtype=WIRE_DTYPES[request.hidden_dtype],
        outside=request.vocab_size < backend.info.vocab_size,
        temperature=request.temperature,
    )
    spec = replace(backend.spec, vocab_size=request.vocab_size)
    rows_VD = backend.head_VD[: backend.info.vocab_size]
    targets = torch.from_numpy(request.targets().astype(np.int64))
    return _response(score_hidden(hidden_ND, rows_VD, spec, targets, options))


def _response(scores: Scores) -> WireResponse:
    return WireResponse(
        logps=scores.logp_N.numpy(),
        support_ids=_ids(scores.support_ids_NK),
        support_logps=_floats(scores.support_logp_NK),
        support_tail=_floats(scores.support_tail_N),
        full_logps=_floats(scores.full_logp_NV),
        hidden=_floats_or_bits(scores.hidden_ND),
        outside=_floats(scores.outside_N),
    )


def _ids(tensor: torch.Tensor | None) -> IntArray | None:
    return None if tensor is None else tensor.numpy().astype(np.int32)


def _floats(tensor: torch.Tensor | None) -> FloatArray | None:
    return None if tensor is None else tensor.numpy()


def _floats_or_bits(tensor: torch.Tensor | None) -> FloatArray | BFloat16Bits | None:
    if tensor is not None and tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy()
    return _floats(tensor)


def _require_ids(name: str, ids: IntArray, lowest: int, end: int) -> None:
    if ids.size and not (lowest <= ids.min() and ids.max() < end):
        raise ValueError(
            f"{name} hold ids from {ids.min()} to {ids.max()}, allowed are {lowest} to {end - 1}"
        )
