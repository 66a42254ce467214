"""Requests to rollout servers and their responses, as bytes: safetensors with JSON metadata.

A request about S prompts, concatenated:
    tensors    token_ids [sum of lengths], lengths [S]: int32
    metadata   format; request: {uids, sampling, run, version}
A response of R = S x n rollouts in the order of ``RolloutEngine.generate``, N tokens in all:
    tensors    token_ids [N] int32, lengths [R] int32, logps [N] float32, stopped [R] uint8,
               samples [R] int32, versions [R] int64, support_ids [N, K] int32 where requested
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load, save

from opd.checked_json import read_json
from opd.config.rollout import LEAST_TEMPERATURE
from opd.types import FinishReason, Prompt, Rollout, Sampling

FORMAT = "opd-rollout-1"
TOKEN_VARIABLE = "OPD_ROLLOUT_TOKEN"
"""Environment variable of the bearer token."""
HEADER_BYTES = 16 << 20  # of a request: uids


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """Prompts and how to complete them, with the weights of ``version`` of ``run`` and no others."""

    prompts: list[Prompt]
    sampling: Sampling
    run: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _RolloutMetadata:
    format: str
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _RolloutHeader:
    """The header of safetensors, whose numpy reader checks it but does not return the metadata."""

    metadata: Annotated[_RolloutMetadata, Field(alias="__metadata__")]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RolloutFields:
    """The request in the metadata."""

    uids: list[str]
    sampling: dict[str, Any]
    run: str
    version: Annotated[int, Field(ge=-1, lt=1 << 62)]


def request_bytes(request: GenerateRequest) -> bytes:
    """A request as safetensors; answers and texts of prompts are not sent."""
    arrays = {
        "token_ids": np.concatenate([p.token_ids for p in request.prompts]),
        "lengths": np.array([len(p.token_ids) for p in request.prompts], np.int32),
    }
    fields = {
        "uids": [p.uid for p in request.prompts],
        "sampling": asdict(request.sampling),
        "run": request.run,
        "version": request.version,
    }
    return save(arrays, {"format": FORMAT, "request": json.dumps(fields)})


def read_request(body: bytes) -> GenerateRequest:
    """The inverse of ``request_bytes``; ``ValueError`` for anything else."""
    size = int.from_bytes(body[:8], "little")
    if size > HEADER_BYTES:
        raise ValueError(f"the header would be {size} bytes long, at most {HEADER_BYTES} are read")
    try:
        arrays = load(body)
        token_ids, lengths = arrays["token_ids"], arrays["lengths"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"the body is not an opd rollout request: {error!r}") from error
    source, remedy = "the body", "send an opd rollout request"
    header = read_json(body[8 : 8 + size], _RolloutHeader, source, remedy).metadata
    if header.format != FORMAT:
        raise ValueError(f"format is {header.format!r}, this server reads {FORMAT!r}")
    fields = read_json(header.request, _RolloutFields, source, remedy)
    uids, sampling = fields.uids, _read_sampling(fields.sampling)
    if token_ids.dtype != np.int32 or lengths.dtype != np.int32 or token_ids.ndim != 1:
        raise ValueError("token_ids and lengths must be flat int32")
    if lengths.ndim != 1 or len(lengths) == 0 or len(lengths) != len(uids) or lengths.min() < 1:
        raise ValueError(
            f"lengths {list(lengths.shape)} and {len(uids)} uids must be as many, at least one, and positive"
        )
    if int(lengths.sum(dtype=np.int64)) != len(token_ids):
        raise ValueError(f"lengths must add up to the {len(token_ids)} token_ids")
    parts = np.split(token_ids, np.cumsum(lengths)[:-1])
    prompts = [Prompt(uid=u, token_ids=part) for u, part in zip(uids, parts, strict=True)]
    return GenerateRequest(
        prompts=prompts, sampling=sampling, run=fields.run, version=fields.version
    )


def response_bytes(rollouts: Sequence[Rollout]) -> bytes:
    """Rollouts as safetensors, without their prompts."""
    arrays = {
        "token_ids": np.concatenate([r.token_ids for r in rollouts]),
        "lengths": np.array([len(r.token_ids) for r in rollouts], np.int32),
        "logps": np.concatenate([r.logps for r in rollouts]),
        "stopped": np.array([r.finish_reason == FinishReason.stop for r in rollouts], np.uint8),
        "samples": np.array([r.sample for r in rollouts], np.int32),
        "versions": np.array([r.version for r in rollouts], np.int64),
    }
    supports = [r.support_ids for r in rollouts if r.support_ids is not None]
    if supports:
        arrays["support_ids"] = np.concatenate(supports)
    return save(arrays)


def read_response(body: bytes, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
    """The inverse of ``response_bytes``; ``prompts`` and ``sampling`` are those of the request.

    ``ValueError`` unless it holds a completion for each sample of each prompt, of finite log-probs.
    """
    arrays = load(body)
    rollouts, start = [], 0
    support = arrays.get("support_ids")
    rows = [prompt for prompt in prompts for _ in range(sampling.n)]
    _require_completions(arrays, len(rows))
    for i, (prompt, length) in enumerate(zip(rows, arrays["lengths"].tolist(), strict=True)):
        span = slice(start, start := start + length)
        rollouts.append(
            Rollout(
                prompt=prompt,
                token_ids=arrays["token_ids"][span].copy(),
                logps=arrays["logps"][span].copy(),
                finish_reason=FinishReason.stop if arrays["stopped"][i] else FinishReason.length,
                version=int(arrays["versions"][i]),
                sample=int(arrays["samples"][i]),
                support_ids=None if support is None else support[span].copy(),
            )
        )
    return rollouts


PER_ROLLOUT = {"lengths": np.int32, "stopped": np.uint8, "samples": np.int32, "versions": np.int64}
PER_TOKEN = {"token_ids": np.int32, "logps": np.float32}
"""Number formats of the arrays of a response."""


def _require_completions(arrays: Mapping[str, np.ndarray], count: int) -> None:
    """ValueError unless these are the arrays of ``count`` completions."""
    lengths = arrays["lengths"]
    tokens = int(lengths.sum(dtype=np.int64))
    for formats, size in ((PER_ROLLOUT, count), (PER_TOKEN, tokens)):
        for name, dtype in formats.items():
            found = arrays[name]
            if found.dtype != dtype or found.shape != (size,):
                raise ValueError(
                    f"{name} is {found.dtype} {list(found.shape)}, expected {np.dtype(dtype)} [{size}]"
                )
    if lengths.min() < 1:
        raise ValueError("a completion has no token")
    if not np.isfinite(arrays["logps"]).all():
        raise ValueError("a log-prob is not finite")
    support = arrays.get("support_ids")
    if support is not None and (support.ndim != 2 or len(support) != tokens):
        raise ValueError(f"support_ids is {list(support.shape)}, expected [{tokens}, K]")


SAMPLING_RANGES = {
    "n": (1, 1 << 16),
    "temperature": (0.0, 1e6),
    "top_p": (1e-9, 1.0),
    "top_k": (-1, 1 << 31),
    "max_tokens": (1, 1 << 31),
    "seed": (0, (1 << 63) - 1),
    "support_k": (0, 1 << 31),
}
"""Least and largest value of each field of ``Sampling`` that a server accepts."""


def _read_sampling(fields: dict[str, Any]) -> Sampling:
    """Every field a number of its kind and within its range: an engine may die of any other."""
    defaults = asdict(Sampling())
    for name, value in fields.items():
        if name not in defaults:
            raise ValueError(f"there is no sampling.{name}: allowed are {', '.join(defaults)}")
        kinds = (int, float) if isinstance(defaults[name], float) else (int,)
        least, most = SAMPLING_RANGES[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise ValueError(f"sampling.{name}={value!r}: allowed is {least} to {most}")
    if 0 < fields.get("temperature", 0) < LEAST_TEMPERATURE:
        raise ValueError(
            f"sampling.temperature={fields['temperature']}: allowed is 0 (greedy), or {LEAST_TEMPERATURE} "
            "and more"
        )
    if fields.get("top_k") == 0:
        raise ValueError("sampling.top_k=0: allowed is -1 (all) or 1 and more")
    return Sampling(**{name: type(defaults[name])(value) for name, value in fields.items()})
