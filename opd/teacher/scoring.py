"""Hidden states into what was asked about them: float32, chunked, alike for every teacher."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from opd.head import HeadSpec, chunk_rows, head_logps, outside_mass

CHUNK_BYTES = 64 << 20  # of one [C, V] block; about four live at once, beside the engine's memory


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What one request asks about each of its N target tokens, besides the sampled log-prob.

    ``top_k`` > 0 and ``named_ids_NK`` (-1 = unused) together make a support: their union.
    ``full_logps`` and ``hidden`` ask for the whole distribution in either form, hidden states in
    ``hidden_dtype``. ``outside`` asks what the ids beyond ``HeadSpec.vocab_size`` got.
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
    """What the teacher says about N target tokens, on the CPU; absent fields were not asked for."""

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
    pieces: ScoreOptions,
) -> Scores:
    """Row n of ``hidden_ND`` predicts ``target_N[n]``; memory stays at a few [C, V] chunks.

    Chunks are computed where ``weight_VD`` lies. ``hidden`` comes back in the dtype asked for: the
    distribution asked for is softmax(hidden @ folded_head(weight_VD, spec).T / temperature).
    """
    assert not (pieces.hidden and spec.softcap is not None), "a capped head is not linear"
    device, rows = weight_VD.device, chunk_rows(spec.vocab_size, CHUNK_BYTES)
    parts = []
    for start in range(0, len(target_N), rows):
        cut = slice(start, start + rows)
        named = None if pieces.named_ids_NK is None else pieces.named_ids_NK[cut].to(device)
        hidden_CD = hidden_ND[cut].to(device)
        logp_CV = head_logps(hidden_CD, weight_VD, spec, pieces.temperature)
        parts.append(_say(logp_CV, target_N[cut].to(device), named, pieces))
        if pieces.outside:
            mass_C = outside_mass(hidden_CD, weight_VD, logp_CV, spec, pieces.temperature)
            parts[-1]["outside_N"] = mass_C.cpu()
    said = {
        f.name: torch.cat([part[f.name] for part in parts])
        for f in fields(Scores)
        if f.name in parts[0]
    }
    if pieces.hidden:
        said["hidden_ND"] = hidden_ND.to(pieces.hidden_dtype).cpu()
    return Scores(**said)


def folded_head(weight_VD: torch.Tensor, spec: HeadSpec) -> torch.Tensor:
    """The head's rows [spec.vocab_size, D] in float32 with its scale multiplied in, on the CPU."""
    return weight_VD[: spec.vocab_size].float().cpu() * spec.scale


def union_ids(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Supports [N, K1], [N, K2], ... side by side; each id stays once a row, repeats become -1."""
    ids_NK = torch.cat(list(parts), dim=1)
    ordered_NK, order_NK = ids_NK.sort(dim=1, stable=True)
    repeated_NK = torch.zeros_like(ids_NK, dtype=torch.bool)
    repeated_NK[:, 1:] = ordered_NK[:, 1:] == ordered_NK[:, :-1]
    return ids_NK.masked_fill(torch.zeros_like(repeated_NK).scatter(1, order_NK, repeated_NK), -1)


def tail_logps(logp_NV: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
    """log(1 - sum of the support's probability), [N], as a logsumexp over the ids outside it.

    Subtracting from one would lose a confident teacher's tail to rounding. -inf when nothing is
    outside.
    """
    used_N1 = ids_NK.amax(dim=1, keepdim=True)  # stands in for the unused places of its row
    inside_NK = ids_NK.where(ids_NK >= 0, used_N1).clamp(min=0)
    tail_N = logp_NV.scatter(1, inside_NK, -torch.inf).logsumexp(dim=1)
    return tail_N.masked_fill(used_N1[:, 0] < 0, 0.0)


def _say(
    logp_CV: torch.Tensor,
    target_C: torch.Tensor,
    named_ids_CK: torch.Tensor | None,
    pieces: ScoreOptions,
) -> dict[str, torch.Tensor]:
    said = {"logp_N": logp_CV.gather(1, target_C[:, None])[:, 0]}
    supports = [] if named_ids_CK is None else [named_ids_CK]
    if pieces.top_k:
        supports.insert(0, logp_CV.topk(min(pieces.top_k, logp_CV.shape[1]), dim=1).indices)
    if supports:
        ids_CK = union_ids(supports)
        logp_CK = logp_CV.gather(1, ids_CK.clamp(min=0))
        said["support_ids_NK"] = ids_CK
        said["support_logp_NK"] = logp_CK.masked_fill(ids_CK < 0, -torch.inf)
        said["support_tail_N"] = tail_logps(logp_CV, ids_CK)
    if pieces.full_logps:
        said["full_logp_NV"] = logp_CV
    return {name: value.cpu() for name, value in said.items()}
