"""Writing safetensors files a tensor at a time; a file appears complete or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch

from opd.checkpoint.stored import DTYPES

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
COPY_BYTES = 1 << 22
"""Bytes copied at once."""


def write_tensors(
    path: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Callable[[], Mapping[str, str]],
) -> None:
    """Write (name, CPU tensor) in any order, one at a time; ``metadata`` is called after the last.

    Wider elements come first in the file: every tensor must start at a multiple of its element size,
    and the format allows no gaps.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    bodies: dict[int, IO[bytes]] = {}
    entries: dict[str, tuple[int, dict[str, Any]]] = {}
    try:
        with ExitStack() as opened:
            for name, tensor in tensors:
                assert name not in entries, f"{name} is written once"
                width = tensor.dtype.itemsize
                if width not in bodies:
                    bodies[width] = opened.enter_context(tempfile.TemporaryFile(dir=path.parent))
                start = bodies[width].tell()
                bodies[width].write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                entries[name] = (
                    width,
                    {
                        "dtype": DTYPE_NAMES[tensor.dtype],
                        "shape": list(tensor.shape),
                        "data_offsets": [start, bodies[width].tell()],
                    },
                )
            widths = sorted(bodies, reverse=True)
            offsets = {w: sum(bodies[v].tell() for v in widths if v > w) for w in widths}
            for width, entry in entries.values():
                entry["data_offsets"] = [offsets[width] + o for o in entry["data_offsets"]]
            listed = {name: entry for name, (_, entry) in entries.items()}
            header = json.dumps({"__metadata__": dict(metadata()), **listed}).encode()
            header += b" " * (-len(header) % 8)
            with partial.open("wb") as file:
                file.write(len(header).to_bytes(8, "little") + header)
                for width in widths:
                    bodies[width].seek(0)
                    shutil.copyfileobj(bodies[width], file, COPY_BYTES)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
