"""Reading a checkpoint's tensors one at a time, under their Hugging Face names."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from opd.checkpoint.fsdp import PATTERN as SHARDS
from opd.checkpoint.fsdp import read_shards, shard_files

READERS = 2
"""Threads that hash; each holds one tensor."""
COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Files beside the weights: configuration, tokenizer, chat template, code."""
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One tensor of a checkpoint; ``read`` returns it on the CPU, as stored."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


class Checkpoint(Mapping[str, Stored]):
    """Weights of a model folder by name, in the order of their names; each is read when needed.

    A head that is tied to the embedding is not listed, whether or not the file repeats it.
    """

    def __init__(self, model: str, tensors: Mapping[str, Stored]) -> None:
        self.model = model
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

    def fingerprint(self) -> str:
        """Hexadecimal digest of names, shapes, dtypes and every bit, whatever the sharding."""
        with ThreadPoolExecutor(READERS) as pool:
            return combine_digests(
                pool.map(lambda named: digest(named[0], named[1].read()), self._tensors.items())
            )


def open_checkpoint(model: str) -> Checkpoint:
    """The weights of a model folder or Hub id: safetensors, ``pytorch_model*.bin`` or FSDP shards.

    Raises ValueError when there are none, or when a shard is truncated or missing.
    """
    folder = model_folder(model)
    files = weight_files(folder)
    if not files:
        raise ValueError(
            f"{model} holds no weights: expected *.safetensors, pytorch_model*.bin or {SHARDS} in "
            f"{folder}"
        )
    tensors: dict[str, Stored] = {}
    if files[0].match(SHARDS):
        tensors = _shards(files)
    else:
        for file in files:
            tensors |= _read_file(file)
    if HEAD in tensors and model_config(folder).get("tie_word_embeddings") and EMBEDDING in tensors:
        del tensors[HEAD]
    return Checkpoint(model, tensors)


def open_tensors(file: Path) -> Checkpoint:
    """The tensors of one safetensors file. Raises ValueError when it is missing or truncated."""
    if not file.is_file():
        raise ValueError(f"there is no file {file}: expected a safetensors file")
    return Checkpoint(str(file), _read_file(file))


def _read_file(file: Path) -> dict[str, Stored]:
    try:
        return _bin_tensors(file) if file.suffix == ".bin" else _safetensors(file)
    except Exception as error:  # each format raises its own kind for a truncated file
        raise ValueError(f"{file} cannot be read ({error}): fetch it again") from error


def _download(model: str) -> Path:
    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", *COMPANIONS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{model} is neither a model folder nor an accessible Hub id ({first})"
        ) from None


def model_folder(model: str) -> Path:
    """The folder of a model given as folder or Hub id; ValueError when it is neither."""
    return Path(model) if Path(model).is_dir() else _download(model)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights. ValueError when one that an index names is missing."""
    for pattern, index in (
        ("*.safetensors", "model.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model.bin.index.json"),
    ):
        if (folder / index).is_file():
            shards = set(json.loads((folder / index).read_text())["weight_map"].values())
            missing = sorted(s for s in shards if not (folder / s).is_file())
            if missing:
                raise ValueError(f"{folder} lacks the shard {missing[0]} that {index} names")
            return sorted(folder / s for s in shards)
        found = sorted(folder.glob(pattern))
        if found:
            return found
    return shard_files(folder)


def model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder, or of ``huggingface/`` beside shards; empty without one."""
    for file in (folder / "config.json", folder / "huggingface" / "config.json"):
        if file.is_file():
            return json.loads(file.read_text())
    return {}


def _shards(files: list[Path]) -> dict[str, Stored]:
    try:
        tensors = read_shards(files)
    except ValueError:
        raise
    except Exception as error:  # truncated files and files with code raise many kinds
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"the shards in {files[0].parent} cannot be read ({first})") from error
    return {
        name: Stored(shape=t.shape, dtype=t.parts[0].dtype, read=t.whole)
        for name, t in tensors.items()
    }


def _safetensors(file: Path) -> dict[str, Stored]:
    opened: Any = safe_open(file, framework="pt")
    return {name: _slice(opened, name) for name in opened.keys()}  # noqa: SIM118  (no mapping)


def _slice(opened: Any, name: str) -> Stored:
    part = opened.get_slice(name)
    return Stored(
        shape=tuple(part.get_shape()),
        dtype=DTYPES[part.get_dtype()],
        read=lambda: opened.get_tensor(name),
    )


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Number formats by their names in safetensors."""


def _bin_tensors(file: Path) -> dict[str, Stored]:
    state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {
        name: Stored(shape=tuple(t.shape), dtype=t.dtype, read=lambda t=t: t)
        for name, t in state.items()
    }


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
