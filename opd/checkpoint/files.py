"""Which files of a folder are the model: those that transformers loads, no more and no less."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from opd.checked_json import read_json
from opd.checkpoint.fsdp import PATTERN as SHARDS
from opd.checkpoint.fsdp import shard_files

COMPANIONS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
"""Files beside the weights: configuration, tokenizer, chat template, code."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""The names under which transformers looks for weights; the first that exists is the model."""
_NUMBERED = re.compile(r"(model|pytorch_model)-(\d+)-of-(\d+)\.(safetensors|bin)$")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.npz")
_MOST_LISTED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files of a model, in the order of their names; ``weight_map`` is what an index promises.

    ``weight_map`` maps each tensor to the name of its file, and is empty without an index.
    """

    files: tuple[Path, ...]
    weight_map: dict[str, str]

    @property
    def are_fsdp_shards(self) -> bool:
        """Whether each file holds one rank's part of every tensor."""
        return self.files[0].match(SHARDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ShardIndex:
    """An index of shards."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Quantisation:
    """Key of a quantisation's settings that opd reads."""

    weight_block_size: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _CheckedKeys:
    """Keys of a config.json that opd reads itself; transformers checks its own."""

    transformers_weights: str | None = None
    text_config: dict[str, Any] | None = None
    quantization_config: _Quantisation | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _AdapterConfig:
    """Key of an adapter_config.json that opd reads."""

    base_model_name_or_path: str | None = None


def model_folder(model: str) -> Path:
    """The folder of a model given as folder or Hub id, ``name@revision`` too; ValueError for other names."""
    return Path(model) if Path(model).is_dir() else _download(model)


def split_revision(model: str) -> tuple[str, str | None]:
    """The name and the revision (branch, tag or commit) of a Hub id; a folder has no revision."""
    name, mark, revision = model.partition("@")
    if not mark or Path(model).is_dir():
        return model, None
    return name, revision


def weight_files(folder: Path) -> WeightFiles:
    """The files that hold a model's weights.

    These are the first of ``FILES`` that exists (and the shards that an index names), which is what
    transformers loads; files beside it are not the model. Two kinds that transformers does not load
    are read as well: FSDP shards, and a complete set of numbered shards that lost its index. Raises
    ValueError without any, and when a shard is missing, naming it.
    """
    explicit = model_config(folder).get("transformers_weights")
    if explicit is not None and explicit != Path(explicit).name:
        raise ValueError(
            f"{folder} has transformers_weights={explicit!r} in its config.json, allowed is a file beside it"
        )
    for name in FILES if explicit is None else (explicit,):
        if (folder / name).is_file():
            if name.endswith(".index.json"):
                return _indexed(folder, name)
            return WeightFiles(files=(folder / name,), weight_map={})
    files = _numbered(folder) or shard_files(folder)
    if not files:
        raise ValueError(_no_weights(folder))
    return WeightFiles(files=tuple(files), weight_map={})


def config_folder(folder: Path) -> Path | None:
    """The folder of a model's ``config.json``: its own, or ``huggingface/`` beside FSDP shards."""
    for candidate in (folder, folder / "huggingface"):
        if (candidate / "config.json").is_file():
            return candidate
    return None


def model_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; empty without one. ValueError when it cannot be read."""
    found = config_folder(folder)
    if found is None:
        return {}
    file = found / "config.json"
    content = file.read_bytes()
    read_json(content, _CheckedKeys, file, "fetch it again")
    return read_json(content, dict[str, Any], file, "fetch it again")


def _indexed(folder: Path, index: str) -> WeightFiles:
    """The shards that an index names."""
    weight_map = _weight_map(folder / index)
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if shard != Path(shard).name]
    if outside:
        raise ValueError(
            f"{folder / index} names the shard {outside[0]!r}, allowed are files beside it: fetch it again"
        )
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks the shard {missing[0]} that {index} names: fetch it again"
        )
    return WeightFiles(files=tuple(folder / shard for shard in shards), weight_map=weight_map)


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor. ValueError when the index does not say."""
    weight_map = read_json(index.read_bytes(), _ShardIndex, index, "fetch it again").weight_map
    if not weight_map:
        raise ValueError(f"{index} has no weight_map of tensors to shards: fetch it again")
    return weight_map


def _numbered(folder: Path) -> list[Path]:
    """Shards "n of m" without an index, safetensors before .bin; empty without any."""
    sets: dict[tuple[str, str, str], set[str]] = {}
    for file in folder.iterdir():
        found = _NUMBERED.match(file.name)
        if found:
            stem, _, total, suffix = found.groups()
            sets.setdefault((suffix, stem, total), set()).add(file.name)
    if not sets:
        return []
    suffix = max(suffix for suffix, _, _ in sets)
    chosen = sorted(key for key in sets if key[0] == suffix)
    if len(chosen) > 1:
        examples = " and ".join(min(sets[key]) for key in chosen)
        raise ValueError(f"{folder} has no index and shards of {len(chosen)} models ({examples})")
    _, stem, total = chosen[0]
    names = [
        f"{stem}-{number:0{len(total)}}-of-{total}.{suffix}" for number in range(1, int(total) + 1)
    ]
    missing = [name for name in names if name not in sets[chosen[0]]]
    if missing:
        raise ValueError(f"{folder} lacks the shard {', '.join(missing)}: fetch it again")
    return [folder / name for name in names]


def _no_weights(folder: Path) -> str:
    """Why a folder is no model, and what to do."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        about = read_json(adapter.read_bytes(), _AdapterConfig, adapter, "fetch it again")
        base = about.base_model_name_or_path or "its base"
        return (
            f"{folder} holds an adapter and no model: merge it into {base} (peft's "
            "merge_and_unload) and give the merged model"
        )
    present = sorted({file.name for pattern in _WEIGHTS for file in folder.glob(pattern)})
    rest = ", ..." if present[_MOST_LISTED:] else ""
    found = f"found {', '.join(present[:_MOST_LISTED])}{rest}; " if present else ""
    return (
        f"{folder} holds no weights that transformers loads: {found}expected {' or '.join(FILES)}, "
        f"or {SHARDS}"
    )


def _download(model: str) -> Path:
    """The snapshot of a Hub id, with the files that transformers loads."""
    folder = _snapshot(model, [*COMPANIONS, SINGLE])
    if (folder / SINGLE).exists():
        return folder
    for name, fallback in ((INDEX, None), (FILES[3], FILES[2])):
        if (folder / name).is_file():
            shards = sorted(set(_weight_map(folder / name).values()))
            return _snapshot(model, [*COMPANIONS, *shards])
        if fallback is not None:
            return _snapshot(model, [*COMPANIONS, fallback])
    return folder


def _snapshot(model: str, patterns: Iterable[str]) -> Path:
    try:
        name, revision = split_revision(model)
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{model} is neither a model folder nor an accessible Hub id ({first})"
        ) from None
