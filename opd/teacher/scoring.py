"""From hidden states to scores: float32, in chunks, the same for every teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from opd.head import HeadSpec, chunk_rows, head_logps, outside_mass
from opd.teacher.backend import Backend
from opd.types import BFloat16Bits, FloatArray, IntArray

CHUNK_BYTES = 64 << 20  # of one [C, V] block; about four live at once, beside the engine's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What to compute for each of N target tokens, besides the sampled log-prob.

    The support is the union of the ``top_k`` likeliest ids and ``named_ids_NK`` (-1: unused).
    ``full_logps`` and ``hidden`` are the whole distribution in either form, hidden states in
    ``hidden_dtype``. ``outside`` is the probability of the ids beyond ``HeadSpec.vocab_size``.
    """

    top_k: int = 0
    named_ids_NK: torch.Tensor | None = None
    full_logps: bool = False
    hidden: bool = False
    hidden_dtype: torch.dtype = torch.float32
    outside: bool = False
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The teacher's scores of N target tokens, on the CPU; fields not requested are None."""

    logp_N: torch.Tensor
    support_ids_NK: torch.Tensor | None = None
    support_logp_NK: torch.Tensor | None = None
    support_tail_N: torch.Tensor | None = None
    full_logp_NV: torch.Tensor | None = None
    hidden_ND: torch.Tensor | None = None
    outside_N: torch.Tensor | None = None


def score_hidden(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    spec: HeadSpec,
    target_N: torch.Tensor,
    options: ScoreOptions,
) -> Scores:
    """Row n of ``hidden_ND`` predicts ``target_N[n]``; memory stays at a few [C, V] chunks.

    Chunks are computed on the device of ``weight_VD``. The distribution that ``hidden`` stands for is
    softmax(hidden @ folded_head(weight_VD, spec).T / temperature).
    """
    assert not (options.hidden and spec.softcap is not None), "a capped head is not linear"
    device, rows = weight_VD.device, chunk_rows(spec.vocab_size, CHUNK_BYTES)
    parts = []
    for start in range(0, len(target_N), rows):
        chunk = slice(start, start + rows)
        named = None if options.named_ids_NK is None else options.named_ids_NK[chunk].to(device)
        hidden_CD = hidden_ND[chunk].to(device)
        logp_CV = head_logps(hidden_CD, weight_VD, spec, options.temperature)
        parts.append(_score_chunk(logp_CV, target_N[chunk].to(device), named, options))
        if options.outside:
            mass_C = outside_mass(hidden_CD, weight_VD, logp_CV, spec, options.temperature)
            parts[-1]["outside_N"] = mass_C.cpu()
    columns = {
        f.name: torch.cat([part[f.name] for part in parts])
        for f in fields(Scores)
        if f.name in parts[0]
    }
    if options.hidden:
        columns["hidden_ND"] = hidden_ND.to(options.hidden_dtype).cpu()
    return Scores(**columns)


def folded_head(weight_VD: torch.Tensor, spec: HeadSpec) -> torch.Tensor:
    """The head's rows [spec.vocab_size, D] in float32 with its scale multiplied in, on the CPU."""
    return weight_VD[: spec.vocab_size].float().cpu() * spec.scale


def copy_rows(weight_VD: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A copy of rows ``start`` to ``stop`` on the CPU, which stays when the matrix moves."""
    return weight_VD[start:stop].to("cpu", copy=True)


def head_rows(rows_VD: torch.Tensor, *, bfloat16: bool) -> FloatArray | BFloat16Bits:
    """Float32 rows of a head as they are sent: with ``bfloat16`` in half the bytes, if that loses nothing."""
    if bfloat16:
        halves_VD = rows_VD.bfloat16()
        if torch.equal(halves_VD.float(), rows_VD):
            return halves_VD.view(torch.uint16).numpy()
    return rows_VD.numpy()


def log_probs(backend: Backend, sequences: list[IntArray]) -> list[torch.Tensor]:
    """The teacher's log-probs [T - 1, V] of every next token of each sequence."""
    return [
        head_logps(hidden_TD[:-1].to(backend.head_VD.device), backend.head_VD, backend.spec)
        for hidden_TD in backend.hidden(sequences)
    ]


def union_ids(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Supports [N, K1], [N, K2], ... side by side; an id stays once per row, repeats become -1."""
    ids_NK = torch.cat(list(parts), dim=1)
    ordered_NK, order_NK = ids_NK.sort(dim=1, stable=True)
    repeated_NK = torch.zeros_like(ids_NK, dtype=torch.bool)
    repeated_NK[:, 1:] = ordered_NK[:, 1:] == ordered_NK[:, :-1]
    return ids_NK.masked_fill(torch.zeros_like(repeated_NK).scatter(1, order_NK, repeated_NK), -1)


def tail_logps(logp_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the support's probability), [N], as a logsumexp over the ids outside it.

    Subtracting from one would round a confident teacher's tail to 0. -inf when no id is outside.
    """
    used_N1 = ids_NK.amax(dim=1, keepdim=True)  # stands in for the unused columns of its row
    inside_NK = ids_NK.where(ids_NK >= 0, used_N1).clamp(min=0)
    tail_N = logp_NV.scatter(1, inside_NK, -torch.inf).logsumexp(dim=1)
    return tail_N.masked_fill(used_N1[:, 0] < 0, 0.0)


def _score_chunk(
    logp_CV: torch.Tensor,
    target_C: torch.Tensor,
    named_ids_CK: torch.Tensor | None,
    options: ScoreOptions,
) -> dict[str, torch.Tensor]:
    columns = {"logp_N": logp_CV.gather(1, target_C[:, None])[:, 0]}
    supports = [] if named_ids_CK is None else [named_ids_CK]
    if options.top_k:
        supports.insert(0, logp_CV.topk(min(options.top_k, logp_CV.shape[1]), dim=1).indices)
    if supports:
        ids_CK = union_ids(supports)
        logp_CK = logp_CV.gather(1, ids_CK.clamp(min=0))
        columns["support_ids_NK"] = ids_CK
        columns["support_logp_NK"] = logp_CK.masked_fill(ids_CK < 0, -torch.inf)
        columns["support_tail_N"] = tail_logps(logp_CV, ids_CK)
    if options.full_logps:
        columns["full_logp_NV"] = logp_CV
    return {name: value.cpu() for name, value in columns.items()}
