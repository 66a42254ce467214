"""Requests to rollout servers and their responses, as bytes: safetensors with JSON metadata.

A request about S prompts, concatenated:
    tensors    token_ids [sum of lengths], lengths [S]: int32
    metadata   format; request: {uids, sampling, run, version}
A response of R = S x n rollouts in the order of ``RolloutEngine.generate``, N tokens in all:
    tensors    token_ids [N] int32, lengths [R] int32, logps [N] float32, stopped [R] uint8,
               samples [R] int32, versions [R] int64, support_ids [N, K] int32 where requested
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

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
        metadata = json.loads(body[8 : 8 + size]).get("__metadata__", {})
        fields = json.loads(metadata.get("request", "{}"))
        found = metadata.get("format")
        token_ids, lengths = arrays["token_ids"], arrays["lengths"]
        uids, run, version = fields["uids"], str(fields["run"]), _read_version(fields["version"])
        sampling = _read_sampling(fields["sampling"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the body is not an opd rollout request: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"format is {found!r}, this server reads {FORMAT!r}")
    if token_ids.dtype != np.int32 or lengths.dtype != np.int32 or token_ids.ndim != 1:
        raise ValueError("token_ids and lengths must be flat int32")
    if not isinstance(uids, list) or not all(isinstance(uid, str) for uid in uids):
        raise ValueError("uids must be a list of texts")
    if lengths.ndim != 1 or len(lengths) == 0 or len(lengths) != len(uids) or lengths.min() < 1:
        raise ValueError(
            f"{len(lengths)} lengths and {len(uids)} uids must be as many, and positive"
        )
    if int(lengths.sum(dtype=np.int64)) != len(token_ids):
        raise ValueError(f"lengths must add up to the {len(token_ids)} token_ids")
    parts = np.split(token_ids, np.cumsum(lengths)[:-1])
    prompts = [Prompt(uid=u, token_ids=part) for u, part in zip(uids, parts, strict=True)]
    return GenerateRequest(prompts=prompts, sampling=sampling, run=run, version=version)


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
    """The inverse of ``response_bytes``; ``prompts`` and ``sampling`` are those of the request."""
    arrays = load(body)
    rollouts, start = [], 0
    support = arrays.get("support_ids")
    rows = [prompt for prompt in prompts for _ in range(sampling.n)]
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


def _read_version(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value < 1 << 62:
        raise ValueError(f"version={value!r}: allowed is a whole number from -1 on")
    return value


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
        kinds = (int, float) if isinstance(defaults[name], float) else (int,)
        least, most = SAMPLING_RANGES[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise ValueError(f"sampling.{name}={value!r}: allowed is {least} to {most}")
    if fields.get("top_k") == 0:
        raise ValueError("sampling.top_k=0: allowed is -1 (all) or 1 and more")
    return Sampling(**{name: type(defaults[name])(value) for name, value in fields.items()})
