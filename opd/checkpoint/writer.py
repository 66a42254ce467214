"""safetensors files written a tensor at a time; a file appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from opd.checkpoint.tensors import DTYPES

WORDS = {dtype: word for word, dtype in DTYPES.items()}
COPIED = 1 << 22
"""Bytes copied at once."""


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Callable[[], Mapping[str, str]],
) -> None:
    """Write (name, CPU tensor) in any order, holding one; ``metadata`` is asked after the last.

    Wider elements lie first in the file: readers need every tensor to start at a multiple of its
    element size, and the format allows no gaps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".partial")
    bodies: dict[int, IO[bytes]] = {}
    found: dict[str, tuple[int, dict[str, Any]]] = {}
    try:
        with ExitStack() as opened:
            for name, tensor in tensors:
                assert name not in found, f"{name} is written once"
                width = tensor.dtype.itemsize
                if width not in bodies:
                    bodies[width] = opened.enter_context(tempfile.TemporaryFile(dir=path.parent))
                start = bodies[width].tell()
                bodies[width].write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                found[name] = (
                    width,
                    {
                        "dtype": WORDS[tensor.dtype],
                        "shape": list(tensor.shape),
                        "data_offsets": [start, bodies[width].tell()],
                    },
                )
            widths = sorted(bodies, reverse=True)
            begins = {w: sum(bodies[v].tell() for v in widths if v > w) for w in widths}
            for width, entry in found.values():
                entry["data_offsets"] = [begins[width] + o for o in entry["data_offsets"]]
            entries = {name: entry for name, (_, entry) in found.items()}
            header = json.dumps({"__metadata__": dict(metadata()), **entries}).encode()
            header += b" " * (-len(header) % 8)
            with whole.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for width in widths:
                    bodies[width].seek(0)
                    shutil.copyfileobj(bodies[width], file, COPIED)
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)
