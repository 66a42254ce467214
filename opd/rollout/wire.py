"""What crosses the wire between a run and its rollout servers: safetensors, words as JSON metadata.

A request about S prompts laid end to end:
    tensors    token_ids [sum of lengths], lengths [S]: int32
    metadata   format; asked: {uids, sampling, run, version}
An answer about R = S x n rollouts in the order of ``RolloutEngine.generate``, N tokens in all:
    tensors    token_ids [N] int32, lengths [R] int32, logps [N] float32, stopped [R] uint8,
               samples [R] int32, versions [R] int64, support_ids [N, K] int32 where asked
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
    """Prompts and how to go on from them, by the weights of ``version`` of ``run`` and no others."""

    prompts: list[Prompt]
    sampling: Sampling
    run: str
    version: int


def request_bytes(request: GenerateRequest) -> bytes:
    """A request as safetensors; answers and texts of prompts stay here."""
    arrays = {
        "token_ids": np.concatenate([p.token_ids for p in request.prompts]),
        "lengths": np.array([len(p.token_ids) for p in request.prompts], np.int32),
    }
    asked = {
        "uids": [p.uid for p in request.prompts],
        "sampling": asdict(request.sampling),
        "run": request.run,
        "version": request.version,
    }
    return save(arrays, {"format": FORMAT, "asked": json.dumps(asked)})


def read_request(body: bytes) -> GenerateRequest:
    """The undo of ``request_bytes``; ``ValueError`` with one clear sentence for anything else."""
    size = int.from_bytes(body[:8], "little")
    if size > HEADER_BYTES:
        raise ValueError(f"the header would be {size} bytes long, at most {HEADER_BYTES} are read")
    try:
        arrays = load(body)
        metadata = json.loads(body[8 : 8 + size]).get("__metadata__", {})
        asked = json.loads(metadata.get("asked", "{}"))
        found = metadata.get("format")
        token_ids, lengths = arrays["token_ids"], arrays["lengths"]
        uids, run, version = asked["uids"], asked["run"], asked["version"]
        sampling = _sampling(asked["sampling"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"the body is no request of ours: {error!r}") from error
    if found != FORMAT:
        raise ValueError(f"format is {found!r}, this server reads {FORMAT!r}")
    if token_ids.dtype != np.int32 or lengths.dtype != np.int32 or token_ids.ndim != 1:
        raise ValueError("token_ids and lengths must be flat int32")
    if len(lengths) == 0 or len(lengths) != len(uids) or lengths.min() < 1:
        raise ValueError(
            f"{len(lengths)} lengths and {len(uids)} uids must be as many, and positive"
        )
    if int(lengths.sum(dtype=np.int64)) != len(token_ids):
        raise ValueError(f"lengths must add up to the {len(token_ids)} token_ids")
    parts = np.split(token_ids, np.cumsum(lengths)[:-1])
    prompts = [Prompt(uid=str(u), token_ids=part) for u, part in zip(uids, parts, strict=True)]
    return GenerateRequest(prompts=prompts, sampling=sampling, run=str(run), version=int(version))


def answer_bytes(rollouts: Sequence[Rollout]) -> bytes:
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


def read_answer(body: bytes, prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
    """The undo of ``answer_bytes``, with the prompts that were asked about."""
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


def _sampling(told: dict[str, Any]) -> Sampling:
    """Numbers only, each of the type that its default has."""
    kinds = asdict(Sampling())
    return Sampling(**{name: type(kinds[name])(value) for name, value in told.items()})
