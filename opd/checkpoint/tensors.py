"""A checkpoint's weights under their Hugging Face names, each read when it is needed."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from opd.checkpoint.family import read_family
from opd.checkpoint.files import model_config, model_folder, weight_files
from opd.checkpoint.quantised import plain_tensors
from opd.checkpoint.stored import Stored, read_file, read_files
from opd.checkpoint.ties import without_tied

READERS = 2
"""Threads that hash; each holds one tensor."""


class Checkpoint(Mapping[str, Stored]):
    """Weights of a model folder by name, in the order of their names; each is read when needed.

    A head that is tied to the embedding is not listed, whether or not the file repeats it. ``folder``
    is that of the model's config.
    """

    def __init__(
        self, model: str, tensors: Mapping[str, Stored], folder: Path | None = None
    ) -> None:
        self.model = model
        self._folder = folder
        self._tensors = {name: tensors[name] for name in sorted(tensors)}

    def __getitem__(self, name: str) -> Stored:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(tensor.numel for tensor in self._tensors.values())

    @property
    def parameters(self) -> "Checkpoint":
        """The tensors that training can change: no buffers, no integers, nothing that is not loaded.

        All floating-point tensors where transformers does not know the model or none of its names.
        """
        floating = {n: t for n, t in self._tensors.items() if t.dtype.is_floating_point}
        family = None if self._folder is None else read_family(self._folder)
        if family is not None:
            loaded = {n: t for n, t in floating.items() if family.is_parameter(n)}
            floating = loaded or floating
        return Checkpoint(self.model, floating, self._folder)

    def fingerprint(self) -> str:
        """Hexadecimal digest of names, shapes, dtypes and every bit, whatever the sharding."""
        with ThreadPoolExecutor(READERS) as pool:
            return combine_digests(
                pool.map(lambda named: digest(named[0], named[1].read()), self._tensors.items())
            )


def open_checkpoint(model: str) -> Checkpoint:
    """The weights of a model folder or Hub id: what transformers loads from its files.

    FP8 weights are dequantised, a head that repeats the embedding is left out, and names have the prefix
    of the base model, which some files leave out. Raises ValueError
    when the folder holds no model, when a shard is truncated or missing, and for other quantised
    formats.
    """
    folder = model_folder(model)
    tensors = plain_tensors(read_files(weight_files(folder)), model_config(folder), model)
    named = _with_prefix(without_tied(tensors, folder), folder)
    return Checkpoint(model, named, folder)


def _with_prefix(tensors: Mapping[str, Stored], folder: Path) -> dict[str, Stored]:
    """The tensors under the names that transformers writes, with the prefix of the base model."""
    family = read_family(folder)
    if family is None:
        return dict(tensors)
    return {family.with_prefix(name): stored for name, stored in tensors.items()}


def open_tensors(file: Path) -> Checkpoint:
    """The tensors of one safetensors file. Raises ValueError when it is missing or truncated."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}: expected a safetensors file")
    return Checkpoint(str(file), read_file(file))


def torch_dtype(name: str) -> torch.dtype:
    """bfloat16 -> torch.bfloat16"""
    return getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> bfloat16"""
    return str(dtype).removeprefix("torch.")


def digest(name: str, tensor: torch.Tensor) -> bytes:
    """Digest of a tensor's name, dtype, shape and every bit [32 bytes]."""
    header = f"{name} {tensor.dtype} {tuple(tensor.shape)}"
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(header.encode() + hashlib.sha256(data.data).digest()).digest()


def combine_digests(digests: Iterable[bytes]) -> str:
    """The fingerprint of a checkpoint from the digests of its tensors, in the order of their names."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]
