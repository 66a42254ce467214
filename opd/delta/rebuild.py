"""Rebuilding a Hugging Face checkpoint from a sparse one: the trained model from the base, and back."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from opd.checkpoint.companions import copy_companions, require_free
from opd.checkpoint.files import model_folder
from opd.checkpoint.tensors import Checkpoint, open_checkpoint
from opd.checkpoint.writer import write_tensors
from opd.delta.format import Delta, Side

SHARD_BYTES = 5 * 10**9


def write_trained(base: Checkpoint, delta: Delta, out: Path) -> None:
    """Write the trained model's folder: its weights bit for bit, all other files from the base's.

    The folder appears complete or not at all. Raises ValueError for another base than the delta's, and
    when ``out`` exists and is not empty.
    """
    _rebuild(base, delta, out, Side.base, Side.trained)


def write_base(trained: Checkpoint, delta: Delta, out: Path) -> None:
    """Write the base model's folder from the trained one's; see ``write_trained``."""
    _rebuild(trained, delta, out, Side.trained, Side.base)


def _rebuild(source: Checkpoint, delta: Delta, out: Path, start: Side, end: Side) -> None:
    require_free(out)
    delta.require_model(start, source.fingerprint(), source.model)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _write_shards(source, delta, partial, start)
        copy_companions(model_folder(source.model), partial)
        found = open_checkpoint(str(partial)).fingerprint()
        if found != delta.models[end].fingerprint:
            raise ValueError(
                f"{delta.path} does not rebuild {delta.models[end].name}: the result has fingerprint "
                f"{found[:12]}, expected {delta.models[end].fingerprint[:12]}; fetch or export it again"
            )
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_shards(source: Checkpoint, delta: Delta, folder: Path, start: Side) -> None:
    shards = list(_shards(source))
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        weight_map |= dict.fromkeys(names, file)
        write_tensors(
            folder / file, _tensors(source, delta, names, start), lambda: {"format": "pt"}
        )
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(_bytes(source, name) for name in weight_map)},
            "weight_map": weight_map,
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensors(
    source: Checkpoint, delta: Delta, names: Iterable[str], start: Side
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        tensor = source[name].read()
        yield name, delta.convert(name, tensor, start) if name in delta.changed else tensor


def _shards(source: Checkpoint) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name in source:
        size = _bytes(source, name)
        if names and total + size > SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    if names:
        yield names


def _bytes(source: Checkpoint, name: str) -> int:
    return source[name].numel * source[name].dtype.itemsize
