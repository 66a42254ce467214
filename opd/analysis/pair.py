"""Pairing the tensors of two checkpoints under canonical names.

A fused parameter (``qkv``, ``qkv_proj``, ``gate_up_proj``, stacked experts) is listed as it is stored
and as its parts: figures of the whole model are over tensors as stored, tables by block, module type
and layer over parts.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opd.checkpoint.family import Conversion, Family, is_tied, read_family
from opd.checkpoint.files import model_config, model_folder
from opd.checkpoint.stored import Stored
from opd.checkpoint.tensors import dtype_name, open_checkpoint
from opd.checkpoint.ties import tied_names

_WRAPPERS = re.compile(r"(_fsdp_wrapped_module\.|_orig_mod\.|^module\.)")
_SUBMODELS = "language_model|visual|vision_tower|vision_model|multi_modal_projector"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One tensor of the base and of the trained model; with a ``reason`` they cannot be compared.

    ``part_of`` names the fused tensor that a part is cut from; ``is_fused`` marks a tensor whose parts
    are listed too.
    """

    name: str
    base: Stored | None
    trained: Stored | None
    reason: str = ""
    part_of: str | None = None
    is_fused: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the base, or in the trained model where the base lacks the tensor."""
        stored = self.base or self.trained
        assert stored is not None
        return stored.shape

    @property
    def numel(self) -> int:
        """Number of weights."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True, kw_only=True)
class CanonicalTensors:
    """A model's tensors by canonical name, and for each part the name of its fused tensor.

    ``ties`` maps heads that are tied, and not listed, to the embeddings that they share.
    """

    tensors: Mapping[str, Stored]
    part_of: Mapping[str, str]
    ties: Mapping[str, str]

    def beside(self, other: "CanonicalTensors") -> dict[str, Stored]:
        """The tensors, with a tied head listed where the other model has one of its own."""
        heads = {
            head: self.tensors[embedding]
            for head, embedding in self.ties.items()
            if head in other.tensors and head not in self.tensors and embedding in self.tensors
        }
        return {**self.tensors, **heads}


def pair_checkpoints(base: str, trained: str) -> list[Pair]:
    """Every tensor of either checkpoint (folders or Hub ids), by canonical name.

    A fused tensor is listed whole only if both checkpoints store it whole, and its parts only if both
    can be taken apart or one of them is stored in parts. Raises ValueError when a checkpoint cannot be
    opened or nothing is common to both.
    """
    families = [read_family(model_folder(model)) for model in (base, trained)]
    known = next((family for family in families if family is not None), None)
    a, b = (
        canonical_tensors(m, f or known) for m, f in zip((base, trained), families, strict=True)
    )
    ours, theirs = a.beside(b), b.beside(a)
    part_of = {**a.part_of, **b.part_of}
    whole = {name for name in part_of.values() if name in ours and name in theirs}
    unmatched = {
        part
        for part, name in part_of.items()
        if name in whole and not (part in ours and part in theirs)
    }
    fused = set(part_of.values())
    names = {*ours, *theirs} - (fused - whole) - unmatched
    pairs = [_pair(name, ours.get(name), theirs.get(name)) for name in sorted(names)]
    if all(pair.reason for pair in pairs):
        raise ValueError(
            f"no tensor of {trained} compares with one of {base} "
            f"({pairs[0].name}: {pairs[0].reason}): give a base and the same model trained"
        )
    listed = {part: name for part, name in part_of.items() if part in names and name in whole}
    return [
        replace(pair, part_of=listed.get(pair.name), is_fused=pair.name in listed.values())
        for pair in pairs
    ]


def as_parts(pairs: Sequence[Pair], names: Collection[str]) -> list[Pair]:
    """The pairs without the fused tensors of these names, whose parts are listed as stored ones."""
    return [
        replace(pair, part_of=None) if pair.part_of in names else pair
        for pair in pairs
        if pair.name not in names
    ]


def canonical_tensors(model: str, family: Family | None) -> CanonicalTensors:
    """A model's tensors, tied heads once, fused matrices and experts whole and in parts.

    ``family`` says under which names transformers holds them in memory, and how it merges them.
    """
    folder = model_folder(model)
    checkpoint, config = open_checkpoint(model), _config(folder)
    found: dict[str, Stored] = {}
    part_of: dict[str, str] = {}
    for stored_name, stored in checkpoint.items():
        in_memory = _WRAPPERS.sub("", stored_name)
        parts: dict[str, Stored] = {}
        if family is not None:
            in_memory = family.renamed(in_memory)
            parts = _converted(family.conversion(in_memory, stored.shape), stored)
        whole = canonical(in_memory)
        stored = parts.pop(whole, stored)
        parts = parts or dict(_split(whole, stored, config))
        part_of |= dict.fromkeys(parts, whole)
        for name, tensor in {whole: stored, **parts}.items():
            if name in found:
                raise ValueError(
                    f"{model} holds {name} twice under different names: export it again"
                )
            found[name] = tensor
    ties = tied_names(folder, list(checkpoint)) if is_tied(folder) else {}
    return CanonicalTensors(
        tensors=found,
        part_of=part_of,
        ties={canonical(head): canonical(embedding) for head, embedding in ties.items()},
    )


def _converted(conversion: Conversion | None, stored: Stored) -> dict[str, Stored]:
    """The tensors that a conversion makes of a stored one, by canonical name."""
    if conversion is None:
        return {}
    apply = conversion.apply
    return {
        canonical(name): Stored(
            shape=shape, dtype=stored.dtype, read=lambda name=name: apply(stored.read())[name]
        )
        for name, shape in conversion.shapes.items()
    }


def canonical(name: str) -> str:
    """The common name of a tensor in text-only, vision-language and wrapped checkpoints.

    ``model.language_model.layers.0...``, ``language_model.model.layers.0...`` and ``layers.0...``
    become ``model.layers.0...``; ``model.visual...`` becomes ``visual...``.
    """
    name = _WRAPPERS.sub("", name)
    name = re.sub(rf"^model\.({_SUBMODELS})\.", r"\1.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    name = re.sub(r"^language_model\.(model\.)?", "model.", name)
    return re.sub(r"^(layers\.|embed_tokens\.|norm\.)", r"model.\1", name)


def _config(folder: Path) -> dict[str, Any]:
    """The language model's settings: those under text_config override the outer ones."""
    outer = model_config(folder)
    return outer | (outer.get("text_config") or {})


def _split(name: str, stored: Stored, config: dict[str, Any]) -> Iterator[tuple[str, Stored]]:
    """The parts of a fused tensor; nothing for any other."""
    for expert, matrix in _experts(name, stored):
        split = _part_rows(expert, matrix.shape, config)
        if not split and expert != name:
            yield expert, matrix
        start = 0
        for part, rows in split.items():
            yield part, _slice(matrix, slice(start, start + rows), (rows, *matrix.shape[1:]))
            start += rows


def _experts(name: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
    """``experts.down_proj`` [experts, rows, columns] as ``experts.N.down_proj.weight``."""
    found = re.search(r"\.experts\.(\w+_proj)$", name)
    if found is None or len(stored.shape) != 3:
        yield name, stored
        return
    stem = name.removesuffix(found[1])
    for expert in range(stored.shape[0]):
        yield f"{stem}{expert}.{found[1]}.weight", _slice(stored, expert, stored.shape[1:])


def _part_rows(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> dict[str, int]:
    """The parts of a fused parameter and their rows; empty for others and when sizes do not fit."""
    if not shape:
        return {}
    rows: dict[str, int] = {}
    if ".qkv_proj." in name and config.get("num_attention_heads"):
        heads = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or config.get("hidden_size", 0) // heads)
        groups = int(config.get("num_key_value_heads") or heads)
        sizes = {"q_proj": heads * width, "k_proj": groups * width, "v_proj": groups * width}
        rows = {name.replace("qkv_proj", part): size for part, size in sizes.items()}
    elif re.search(r"^visual\..*\.qkv\.", name) and shape[0] % 3 == 0:
        rows = {name.replace("qkv", part): shape[0] // 3 for part in ("q", "k", "v")}
    elif ".gate_up_proj." in name:
        sizes = [config.get(k) for k in ("moe_intermediate_size", "intermediate_size")]
        half = next((int(size) for size in sizes if size and 2 * size == shape[0]), 0)
        rows = {name.replace("gate_up_proj", part): half for part in ("gate_proj", "up_proj")}
    return rows if sum(rows.values()) == shape[0] else {}


def _slice(stored: Stored, part: int | slice, shape: tuple[int, ...]) -> Stored:
    read: Callable[[], torch.Tensor] = stored.read
    return Stored(shape=tuple(shape), dtype=stored.dtype, read=lambda: read()[part])


def _pair(name: str, base: Stored | None, trained: Stored | None) -> Pair:
    reason = ""
    if base is None or trained is None:
        reason = f"only in the {'trained model' if base is None else 'base'}"
    elif base.shape != trained.shape:
        reason = f"shape {list(base.shape)} in the base, {list(trained.shape)} in the trained model"
    elif not (base.dtype.is_floating_point and trained.dtype.is_floating_point):
        reason = (
            f"no floating-point numbers ({dtype_name(base.dtype)}, {dtype_name(trained.dtype)})"
        )
    elif not base.numel:
        reason = "empty"
    return Pair(name=name, base=base, trained=trained, reason=reason)
