"""A sparse checkpoint as a SHiRA adapter, which ``PeftModel.from_pretrained`` loads onto the base.

SHiRA (arXiv 2406.13175; peft.tuners.shira) adds to the weight of a Linear a float32 value at each of
a list of coordinates. PEFT asks for r * (in + out) of them in every adapted Linear, with one r for the
whole adapter and no more than the Linear has weights. Any subnetwork takes that form when r is the
largest that a tensor needs and free coordinates are filled up with zeros. A norm travels whole, under
``modules_to_save``. Embeddings, biases and fused experts have no place in the format.

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

from opd.checkpoint.tensors import Checkpoint, model_folder
from opd.checkpoint.writer import write_tensors
from opd.delta.format import Delta, Side


class Others(StrEnum):
    """What is done about changed parameters that an adapter cannot hold."""

    refuse = "refuse"
    drop = "drop"


PREFIX = "base_model.model."
NAMED = 6
"""Parameters that a refusal names before it counts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """What was written.

    ``rank`` is PEFT's r; ``stored`` counts values in the adapted Linears, zeros included; ``rounded``
    counts weights that base + difference misses by a rounding; ``left_out`` says which parameters the
    adapter lacks, and why.
    """

    rank: int
    linears: list[str]
    norms: list[str]
    stored: int
    rounded: int
    left_out: dict[str, str]


@dataclass(slots=True)
class _Tally:
    stored: int = 0
    rounded: int = 0
    not_finite: list[str] = field(default_factory=list)


def export_shira(base: Checkpoint, delta: Delta, out: Path, others: Others) -> Adapter:
    """Write adapter_config.json and adapter_model.safetensors into ``out``.

    Raises ValueError for another base than the delta's, for a delta that changes nothing, and, with
    ``Others.refuse``, when a changed parameter has no place in the format.
    """
    delta.require(Side.base, base.fingerprint(), base.model)
    linears, norms, left_out = _sorted_out(base, delta)
    linears, rank = _common_rank(base, delta, linears, left_out)
    _require_welcome(left_out, others, kept=len(linears) + len(norms))
    out.mkdir(parents=True, exist_ok=True)
    tally = _Tally()
    write_tensors(
        out / "adapter_model.safetensors",
        _tensors(base, delta, linears, norms, rank, tally),
        lambda: {"format": "pt"},
    )
    (out / "adapter_config.json").write_text(
        json.dumps(_config(base.model, rank, linears, norms), indent=2) + "\n"
    )
    return Adapter(
        rank=rank,
        linears=linears,
        norms=norms,
        stored=tally.stored,
        rounded=tally.rounded,
        left_out=left_out,
    )


def _sorted_out(base: Checkpoint, delta: Delta) -> tuple[list[str], list[str], dict[str, str]]:
    """Changed weights of Linears, those of norms, and the rest with the reason."""
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
    after = delta.turned(name, before, Side.base)
    return bool(((after.float() - before.float()).isfinite() | (before == after)).all())


def _common_rank(
    base: Checkpoint, delta: Delta, linears: list[str], left_out: dict[str, str]
) -> tuple[list[str], int]:
    """The Linears that one r suits, and that r: the largest need, below the smallest room."""
    if not linears:
        return [], 1
    need = {
        name: max(1, math.ceil(delta.changed[name].count / sum(base[name].shape)))
        for name in linears
    }
    room = {name: base[name].numel // sum(base[name].shape) for name in linears}
    narrowest = min(linears, key=lambda name: room[name])
    for name in linears:
        if need[name] > room[narrowest]:
            left_out[name] = (
                f"{delta.changed[name].count} changes need r={need[name]}, and {narrowest} has room "
                f"for r={room[narrowest]}"
            )
    kept = [name for name in linears if need[name] <= room[narrowest]]
    return kept, max((need[name] for name in kept), default=1)


def _require_welcome(left_out: dict[str, str], others: Others, *, kept: int) -> None:
    named = [f"{name} ({reason})" for name, reason in left_out.items()]
    told = "; ".join(named[:NAMED]) + (f"; {len(named) - NAMED} more" if named[NAMED:] else "")
    if left_out and others == Others.refuse:
        raise ValueError(
            f"a SHiRA adapter cannot hold {len(left_out)} of the changed parameters: {told}. Use "
            "format=delta, which holds everything, or others=drop to leave them out"
        )
    if kept == 0:
        raise ValueError(
            "nothing that a SHiRA adapter can hold changed"
            + (f": {told}" if told else ", base and trained are the same")
            + "; use format=delta"
        )


def _tensors(
    base: Checkpoint,
    delta: Delta,
    linears: Iterable[str],
    norms: Iterable[str],
    rank: int,
    tally: _Tally,
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in linears:
        before = base[name].read()
        after = delta.turned(name, before, Side.base)
        indices, values = _filled(delta.bits(name)[0].long(), before, after, rank)
        tally.stored += len(values)
        tally.rounded += _rounded(indices, values, before, after)
        module = PREFIX + name.removesuffix(".weight")
        yield f"{module}.shira_weight", values
        yield f"{module}.shira_indices", indices.to(torch.int32)
    for owner in _owners(norms):
        for name in base:
            if name.rpartition(".")[0] == owner:
                tensor = base[name].read()
                whole = delta.turned(name, tensor, Side.base) if name in norms else tensor
                yield PREFIX + name, whole


def _filled(
    coordinates: torch.Tensor, before: torch.Tensor, after: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row and column [2, count], difference [count]) with count = rank * (rows + columns)."""
    count = rank * sum(before.shape)
    first = torch.arange(count)
    free = first[~torch.isin(first, coordinates)][: count - len(coordinates)]
    chosen = torch.cat([coordinates, free]).sort().values
    difference = (after.reshape(-1)[chosen].float() - before.reshape(-1)[chosen].float()).float()
    return torch.stack([chosen // before.shape[1], chosen % before.shape[1]]), difference


def _rounded(
    indices: torch.Tensor, values: torch.Tensor, before: torch.Tensor, after: torch.Tensor
) -> int:
    """Weights that the adapted layer, whose own addition on a CPU this is, does not hit."""
    adapted = before.clone()
    adapted += torch.sparse_coo_tensor(indices, values, before.shape, check_invariants=True)
    return int((adapted != after).sum())


def _owners(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _config(model: str, rank: int, linears: list[str], norms: list[str]) -> dict[str, Any]:
    return {
        "peft_type": "SHIRA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "revision": None,
        "auto_mapping": None,
        "r": rank,
        "target_modules": _owners(linears),
        "modules_to_save": _owners(norms) or None,
        # not "random": PEFT would draw a random mask for every layer, to replace it by the one here
        "mask_type": "discovered",
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
        "inference_mode": True,
    }
