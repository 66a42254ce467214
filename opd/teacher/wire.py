"""Requests to teacher servers and their responses, as bytes: safetensors, scalars as metadata.

A request holds S concatenated sequences with N = sum(length - start) target tokens:
    tensors    token_ids [sum of lengths], lengths [S], starts [S], maybe named_ids [N, K]: int32
    metadata   format, top_k, want (logps | full_logps | hidden), temperature, vocab_size,
               hidden_dtype (float32 | bfloat16)
A response holds, for the N targets in the same order, float32 but for the ids:
    logps [N], support_ids [N, K] int32, support_logps [N, K], support_tail [N],
    full_logps [N, vocab_size], hidden [N, D]; the last five where requested;
    outside [N] where the teacher has more ids than vocab_size
bfloat16 is sent as its bits in uint16, since numpy has no bfloat16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opd.config.student import DType
from opd.teacher.metadata import read_count, read_hidden_dtype, read_metadata, read_number
from opd.types import (
    BFloat16Bits,
    FloatArray,
    IntArray,
    Rollout,
    ScoredRollout,
    ScoreRequest,
    SupportLogps,
)

FORMAT = "opd-teacher-1"
TOKEN_VARIABLE = "OPD_TEACHER_TOKEN"
"""Environment variable of the bearer token."""
HEADER_BYTES = 1 << 16  # of a request, which has at most four tensors and six strings


class Want(StrEnum):
    """How much of the distribution to return besides the sampled log-probs and a support."""

    logps = "logps"
    full_logps = "full_logps"
    hidden = "hidden"


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRequest:
    """Whole sequences, and the first token to score of each (at least 1)."""

    token_ids: IntArray
    lengths: IntArray
    starts: IntArray
    named_ids: IntArray | None = None
    top_k: int = 0
    want: Want = Want.logps
    temperature: float = 1.0
    vocab_size: int
    hidden_dtype: DType = DType.float32

    def sequences(self) -> list[IntArray]:
        """The S sequences, one array each."""
        return np.split(self.token_ids, np.cumsum(self.lengths)[:-1])

    def support_width(self) -> int:
        """Ids per target in the support of the response; 0 for none."""
        named = 0 if self.named_ids is None else self.named_ids.shape[1]
        return min(self.top_k, self.vocab_size) + named

    def targets(self) -> IntArray:
        """The N tokens to score."""
        pairs = zip(self.sequences(), self.starts, strict=True)
        return np.concatenate([sequence[start:] for sequence, start in pairs])


@dataclass(frozen=True, slots=True, kw_only=True)
class WireResponse:
    """The scores of the N targets of one request."""

    logps: FloatArray
    support_ids: IntArray | None = None
    support_logps: FloatArray | None = None
    support_tail: FloatArray | None = None
    full_logps: FloatArray | None = None
    hidden: FloatArray | BFloat16Bits | None = None
    outside: FloatArray | None = None


def wire_request_from(
    rollouts: Sequence[Rollout],
    request: ScoreRequest,
    *,
    want: Want,
    vocab_size: int,
    hidden_dtype: DType = DType.float32,
) -> WireRequest:
    """One request for these rollouts, each behind the prompt that its teacher sees.

    Support ids that only the student's matrix has are left out.
    """
    sequences = [rollout.teacher_sequence for rollout in rollouts]
    return WireRequest(
        token_ids=np.concatenate(sequences),
        lengths=np.array([len(s) for s in sequences], np.int32),
        starts=np.array([len(r.teacher_prompt) for r in rollouts], np.int32),
        named_ids=_named_ids(rollouts, vocab_size) if request.rollout_support else None,
        top_k=request.top_k,
        want=want,
        temperature=request.temperature,
        vocab_size=vocab_size,
        hidden_dtype=hidden_dtype,
    )


def scored_rollouts(rollouts: Sequence[Rollout], response: WireResponse) -> list[ScoredRollout]:
    """One ``ScoredRollout`` per rollout; arrays are copies, so that the response can be freed."""
    scored, start = [], 0
    for rollout in rollouts:
        rows = slice(start, start := start + len(rollout.token_ids))
        scored.append(
            ScoredRollout(
                rollout=rollout,
                logps=response.logps[rows].copy(),
                support=_support(response, rows),
                full_logps=None
                if response.full_logps is None
                else response.full_logps[rows].copy(),
                hidden=None if response.hidden is None else response.hidden[rows].copy(),
                outside=None if response.outside is None else response.outside[rows].copy(),
            )
        )
    return scored


def request_bytes(request: WireRequest) -> bytes:
    """A request as safetensors."""
    arrays = {"token_ids": request.token_ids, "lengths": request.lengths, "starts": request.starts}
    if request.named_ids is not None:
        arrays["named_ids"] = request.named_ids
    metadata = {
        "format": FORMAT,
        "top_k": str(request.top_k),
        "want": request.want.value,
        "temperature": repr(request.temperature),
        "vocab_size": str(request.vocab_size),
        "hidden_dtype": request.hidden_dtype.value,
    }
    return save(arrays, metadata)


def read_request(body: bytes) -> WireRequest:
    """The inverse of ``request_bytes``; ``ValueError`` for anything else.

    Checks what needs no model: fields, types, and that shapes agree.
    """
    size = int.from_bytes(body[:8], "little")
    if size > HEADER_BYTES:
        raise ValueError(f"the header would be {size} bytes long, at most {HEADER_BYTES} are read")
    arrays, metadata = _tensors(body), read_metadata(body)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"format is {metadata.get('format')!r}, this server reads {FORMAT!r}")
    for name in ("token_ids", "lengths", "starts"):
        if name not in arrays or arrays[name].ndim != 1:
            raise ValueError(f"a request needs a one-dimensional tensor {name!r}")
    for name, array in arrays.items():
        if array.dtype != np.int32:
            raise ValueError(f"tensor {name!r} is {array.dtype}, must be int32")
    request = WireRequest(
        token_ids=arrays["token_ids"],
        lengths=arrays["lengths"],
        starts=arrays["starts"],
        named_ids=arrays.get("named_ids"),
        want=_read_want(metadata),
        top_k=read_count(metadata, "top_k"),
        temperature=read_number(metadata, "temperature"),
        vocab_size=read_count(metadata, "vocab_size"),
        hidden_dtype=read_hidden_dtype(metadata),
    )
    _require_shapes(request)
    return request


def read_head_rows(body: bytes) -> FloatArray:
    """Rows of an output head in float32, from a response that may hold them in bfloat16."""
    rows = load(body)["head"]
    return as_float32(rows) if rows.dtype == np.uint16 else rows


def as_float32(bits: BFloat16Bits) -> FloatArray:
    """bfloat16 numbers, given as their bits, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def response_bytes(response: WireResponse) -> bytes:
    """A response as safetensors."""
    arrays = {field.name: getattr(response, field.name) for field in fields(response)}
    return save({name: array for name, array in arrays.items() if array is not None})


def read_response(body: bytes) -> WireResponse:
    """The inverse of ``response_bytes``."""
    return WireResponse(**_tensors(body))


def _require_shapes(request: WireRequest) -> None:
    lengths, starts = request.lengths, request.starts
    if len(lengths) == 0 or len(lengths) != len(starts):
        raise ValueError(
            f"{len(lengths)} lengths and {len(starts)} starts, must be as many and at least one"
        )
    total = len(request.token_ids)
    if lengths.min() < 1 or lengths.sum(dtype=np.int64) != total:
        raise ValueError(f"lengths must be positive and add up to the {total} token_ids")
    if (starts < 1).any() or (starts >= lengths).any():
        raise ValueError("every start must be at least 1 and below the length of its sequence")
    targets = int((lengths - starts).sum(dtype=np.int64))
    named = request.named_ids
    if named is not None and (named.ndim != 2 or len(named) != targets or named.shape[1] < 1):
        raise ValueError(
            f"named_ids is {list(named.shape)}, must be [{targets}, K] with K from 1 on"
        )


def _named_ids(rollouts: Sequence[Rollout], vocab_size: int) -> IntArray:
    supports = [r.support_ids for r in rollouts if r.support_ids is not None]
    if len(supports) != len(rollouts):
        raise ValueError(
            "the request needs the student's support, but the rollouts have no support_ids; "
            "set Sampling.support_k so that the engine returns them"
        )
    named = np.full((sum(map(len, supports)), max(s.shape[1] for s in supports)), -1, np.int32)
    start = 0
    for ids in supports:
        named[start : start + len(ids), : ids.shape[1]] = ids
        start += len(ids)
    return np.where(named < vocab_size, named, -1)


def _support(response: WireResponse, rows: slice) -> SupportLogps | None:
    ids, logps, tail = response.support_ids, response.support_logps, response.support_tail
    if ids is None or logps is None or tail is None:
        return None
    return SupportLogps(ids=ids[rows].copy(), logps=logps[rows].copy(), tail_logp=tail[rows].copy())


def _tensors(body: bytes) -> dict[str, np.ndarray]:
    try:
        return load(body)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"the body is not safetensors of plain tensors: {error}") from error


def _read_want(metadata: Mapping[str, str]) -> Want:
    found = metadata.get("want")
    if found not in list(Want):
        raise ValueError(f"metadata 'want' is {found!r}, must be one of {', '.join(Want)}")
    return Want(found)
