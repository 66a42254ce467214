"""Exporting a sparse checkpoint as a SHiRA adapter, which ``PeftModel.from_pretrained`` loads.

SHiRA (arXiv 2406.13175; peft.tuners.shira) adds float32 values at a list of indices to the weight of a
Linear. PEFT requires r * (in + out) of them in every adapted Linear, with one r for the whole adapter
and no more than the Linear has weights. Any subnetwork fits when r is the largest that a tensor needs
and unused indices are padded with zeros. Norms are stored whole, under ``modules_to_save``. The format
cannot hold embeddings, biases and fused experts.

The base plus a difference is rounded once more than the trained weight was, so the result is the
trained model up to a unit in the last place; `opd mask apply` is exact.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.checkpoint.files import model_folder
from opd.checkpoint.tensors import Checkpoint
from opd.checkpoint.writer import write_tensors
from opd.delta.format import Delta, Side


class UnsupportedParameters(StrEnum):
    """What to do about changed parameters that an adapter cannot hold."""

    refuse = "refuse"
    drop = "drop"


PREFIX = "base_model.model."
MAX_LISTED = 6
"""Parameters that an error lists before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An exported adapter.

    ``rank`` is PEFT's r; ``stored`` counts values in the adapted Linears, zeros included; ``rounded``
    counts weights that base + difference misses by a rounding; ``left_out`` maps parameters that the
    adapter lacks to the reason.
    """

    rank: int
    linears: list[str]
    norms: list[str]
    stored: int
    rounded: int
    left_out: dict[str, str]


@dataclass(slots=True)
class _Counts:
    stored: int = 0
    rounded: int = 0
    not_finite: list[str] = field(default_factory=list)


def export_shira(
    base: Checkpoint, delta: Delta, out: Path, others: UnsupportedParameters
) -> Adapter:
    """Write adapter_config.json and adapter_model.safetensors into ``out``.

    Raises ValueError for another base than the delta's, for a delta that changes nothing, and, with
    ``UnsupportedParameters.refuse``, when the format cannot hold a changed parameter.
    """
    delta.require_model(Side.base, base.fingerprint(), base.model)
    linears, norms, left_out = _classify(base, delta)
    linears, rank = _common_rank(base, delta, linears, left_out)
    _require_supported(left_out, others, kept=len(linears) + len(norms))
    out.mkdir(parents=True, exist_ok=True)
    counts = _Counts()
    write_tensors(
        out / "adapter_model.safetensors",
        _tensors(base, delta, linears, norms, rank, counts),
        lambda: {"format": "pt"},
    )
    (out / "adapter_config.json").write_text(
        json.dumps(_config(base.model, rank, linears, norms), indent=2) + "\n"
    )
    return Adapter(
        rank=rank,
        linears=linears,
        norms=norms,
        stored=counts.stored,
        rounded=counts.rounded,
        left_out=left_out,
    )


def _classify(base: Checkpoint, delta: Delta) -> tuple[list[str], list[str], dict[str, str]]:
    """Changed weights of Linears, those of norms, and unsupported ones with the reason."""
    modules = _modules(base.model)
    linears, norms, left_out = [], [], {}
    for name, changed in delta.changed.items():
        owner, _, leaf = name.rpartition(".")
        module = modules.get(owner)
        if module is None:
            left_out[name] = "no module of that name"
        elif leaf == "weight" and isinstance(module, torch.nn.Linear):
            if _finite(delta, name, base):
                linears.append(name)
            else:
                left_out[name] = "values that are not finite"
        elif (
            len(changed.shape) == 1
            and not isinstance(module, torch.nn.Linear)
            and not any(True for _ in module.children())
        ):
            norms.append(name)
        else:
            left_out[name] = type(module).__name__ + (" bias" if leaf == "bias" else "")
    return linears, norms, left_out


def _modules(model: str) -> dict[str, torch.nn.Module]:
    """The modules of a causal language model, without its weights."""
    with torch.device("meta"):
        return dict(
            AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(model_folder(model))
            ).named_modules()
        )


def _finite(delta: Delta, name: str, base: Checkpoint) -> bool:
    before = base[name].read()
    after = delta.convert(name, before, Side.base)
    return bool(((after.float() - before.float()).isfinite() | (before == after)).all())


def _common_rank(
    base: Checkpoint, delta: Delta, linears: list[str], left_out: dict[str, str]
) -> tuple[list[str], int]:
    """The Linears that one r suits, and that r: the largest required, at most the smallest capacity."""
    if not linears:
        return [], 1
    required = {
        name: max(1, math.ceil(delta.changed[name].count / sum(base[name].shape)))
        for name in linears
    }
    capacity = {name: base[name].numel // sum(base[name].shape) for name in linears}
    narrowest = min(linears, key=lambda name: capacity[name])
    for name in linears:
        if required[name] > capacity[narrowest]:
            left_out[name] = (
                f"{delta.changed[name].count} changes need r={required[name]}, and {narrowest} has room "
                f"for r={capacity[narrowest]}"
            )
    kept = [name for name in linears if required[name] <= capacity[narrowest]]
    return kept, max((required[name] for name in kept), default=1)


def _require_supported(
    left_out: dict[str, str], others: UnsupportedParameters, *, kept: int
) -> None:
    reasons = [f"{name} ({reason})" for name, reason in left_out.items()]
    rest = f"; {len(reasons) - MAX_LISTED} more" if reasons[MAX_LISTED:] else ""
    listing = "; ".join(reasons[:MAX_LISTED]) + rest
    if left_out and others == UnsupportedParameters.refuse:
        raise ValueError(
            f"a SHiRA adapter cannot hold {len(left_out)} of the changed parameters: {listing}. Use "
            "format=delta, which holds everything, or others=drop to leave them out"
        )
    if kept == 0:
        raise ValueError(
            "nothing that a SHiRA adapter can hold changed"
            + (f": {listing}" if listing else ", base and trained are the same")
            + "; use format=delta"
        )


def _tensors(
    base: Checkpoint,
    delta: Delta,
    linears: Iterable[str],
    norms: Iterable[str],
    rank: int,
    counts: _Counts,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in linears:
        before = base[name].read()
        after = delta.convert(name, before, Side.base)
        indices, values = _pad(delta.read(name)[0].long(), before, after, rank)
        counts.stored += len(values)
        counts.rounded += _count_rounded(indices, values, before, after)
        module = PREFIX + name.removesuffix(".weight")
        yield f"{module}.shira_weight", values
        yield f"{module}.shira_indices", indices.to(torch.int32)
    for owner in _module_names(norms):
        for name in base:
            if name.rpartition(".")[0] == owner:
                tensor = base[name].read()
                whole = delta.convert(name, tensor, Side.base) if name in norms else tensor
                yield PREFIX + name, whole


def _pad(
    indices: torch.Tensor, before: torch.Tensor, after: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row and column [2, count], difference [count]) with count = rank * (rows + columns)."""
    count = rank * sum(before.shape)
    first = torch.arange(count)
    unused = first[~torch.isin(first, indices)][: count - len(indices)]
    chosen = torch.cat([indices, unused]).sort().values
    difference = (after.reshape(-1)[chosen].float() - before.reshape(-1)[chosen].float()).float()
    return torch.stack([chosen // before.shape[1], chosen % before.shape[1]]), difference


def _count_rounded(
    indices: torch.Tensor, values: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> int:
    """Weights at which base + difference, added as the adapted layer does, is not the trained one."""
    adapted = before.clone()
    adapted += torch.sparse_coo_tensor(indices, values, before.shape, check_invariants=True)
    return int((adapted != after).sum())


def _module_names(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _config(model: str, rank: int, linears: list[str], norms: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": None,
        "auto_mapping": None,
        "r": rank,
        "target_modules": _module_names(linears),
        "modules_to_save": _module_names(norms) or None,
        # not "random": PEFT would draw a random mask for every layer, to replace it by the one here
        "mask_type": "discovered",
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "inference_mode": True,
    }
