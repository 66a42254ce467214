"""What a teacher reads from a Hugging Face checkpoint besides the layers: tokenizer, sizes, head."""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from opd.head import HeadSpec
from opd.reference import head_spec
from opd.teacher.vocabulary import base_and_added, fingerprint
from opd.types import TeacherInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PROBE_TEXT = "The capital of France is Paris, and 12 + 30 = 42."
HEADS = ("lm_head.weight",)
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def read_info(model: str, *, max_length: int, dtype: torch.dtype | None = None) -> TeacherInfo:
    """``TeacherInfo`` of a checkpoint folder or Hub id; reads no weights.

    ``dtype`` is the compute precision, by default the one in its config.
    """
    config = AutoConfig.from_pretrained(model)
    text = config.get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(model)
    compute_dtype = dtype or text.dtype or config.dtype or torch.float32
    base, added = base_and_added(tokenizer)
    return TeacherInfo(
        model=model,
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        tokenizer_fingerprint=fingerprint(tokenizer),
        tokenizer_size=len(tokenizer),
        max_length=max_length,
        dtype=str(compute_dtype).removeprefix("torch."),
        linear_head=read_spec(model).softcap is None,
        base_fingerprint=base,
        added_tokens=added,
    )


def read_spec(model: str) -> HeadSpec:
    """The ``HeadSpec`` of a checkpoint's config."""
    return head_spec(AutoConfig.from_pretrained(model))


def probe_text(model: str) -> list[int]:
    """Token ids of a plain sentence, for a comparison with the model's own forward pass."""
    ids = AutoTokenizer.from_pretrained(model)(PROBE_TEXT, add_special_tokens=False)["input_ids"]
    return [int(i) for i in ids] or [0]


def max_positions(model: str) -> int:
    """``max_position_embeddings`` of the checkpoint's config."""
    return AutoConfig.from_pretrained(model).get_text_config().max_position_embeddings


def read_head(model: str) -> torch.Tensor:
    """The output head [V, D], float32, from the safetensors files.

    It is ``lm_head.weight``, under any prefix; where the checkpoint has none, the head is tied to the
    input embedding, which is read. ``ValueError`` for a head that is not a plain matrix.
    """
    files = _tensor_files(model)
    names = _names_ending(files, HEADS) or _names_ending(files, EMBEDDINGS)
    if len(names) != 1:
        raise ValueError(
            f"{model}: expected one tensor named {' or '.join(HEADS + EMBEDDINGS)} to use as the "
            f"output head and found {names or 'none'}; use an unquantised causal language model"
        )
    bias = names[0].removesuffix("weight") + "bias"
    if bias in files:
        raise ValueError(f"{model}: the output head has a bias ({bias}), which is not supported")
    with safe_open(files[names[0]], framework="pt") as opened:
        return opened.get_tensor(names[0]).float()


def checkpoint_bytes(model: str) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in set(_tensor_files(model).values()))


def _names_ending(files: dict[str, Path], endings: tuple[str, ...]) -> list[str]:
    return [n for n in files for end in endings if n == end or n.endswith(f".{end}")]


def _tensor_files(model: str) -> dict[str, Path]:
    """The file of each tensor."""
    folder = Path(model)
    if not folder.is_dir():
        patterns = ["*.safetensors", f"*{INDEX}"]
        folder = Path(snapshot_download(model, allow_patterns=patterns))
    if (folder / INDEX).exists():
        shards = json.loads((folder / INDEX).read_text())["weight_map"]
        return {name: folder / shard for name, shard in shards.items()}
    if not (folder / SINGLE).exists():
        raise ValueError(
            f"{model}: found neither {SINGLE} nor {INDEX}; a teacher needs a safetensors checkpoint"
        )
    with safe_open(folder / SINGLE, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), folder / SINGLE)
