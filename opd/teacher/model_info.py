"""What a teacher reads from a Hugging Face checkpoint besides the layers: tokenizer, sizes, head."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from opd.checkpoint.family import is_tied
from opd.checkpoint.files import model_folder
from opd.checkpoint.tensors import open_checkpoint, torch_dtype
from opd.head import HeadSpec
from opd.model_head import head_spec, head_width, read_model_config
from opd.reference import TOKENS
from opd.teacher.vocabulary import base_and_added, fingerprint
from opd.types import TeacherInfo

LEAST_TOKENS = 4
PROBE_TEXT = "The capital of France is Paris, and 12 + 30 = 42."
HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def read_info(model: str, *, max_length: int, dtype: torch.dtype | None = None) -> TeacherInfo:
    """``TeacherInfo`` of a checkpoint folder or Hub id; reads no weights.

    ``dtype`` is the compute precision, by default the one in its config.
    """
    config = read_model_config(model)
    text = config.get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(model)
    compute_dtype = dtype or read_dtype(model)
    base, added = base_and_added(tokenizer)
    return TeacherInfo(
        model=model,
        vocab_size=text.vocab_size,
        hidden_size=head_width(config),
        tokenizer_fingerprint=fingerprint(tokenizer),
        tokenizer_size=len(tokenizer),
        max_length=max_length,
        dtype=str(compute_dtype).removeprefix("torch."),
        linear_head=read_spec(model).softcap is None,
        base_fingerprint=base,
        added_tokens=added,
    )


def read_dtype(model: str) -> torch.dtype:
    """The number format in a checkpoint's config; float32 where it names none."""
    config = read_model_config(model)
    found = config.get_text_config().dtype or config.dtype or torch.float32
    return torch_dtype(found) if isinstance(found, str) else found


def read_spec(model: str) -> HeadSpec:
    """The ``HeadSpec`` of a checkpoint's config."""
    return head_spec(read_model_config(model))


def probe_text(model: str) -> list[int]:
    """Token ids of a plain sentence, for a comparison with the model's own forward pass.

    A tokenizer that does not know its words gives way to the first ids.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [int(i) for i in tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"]]
    return ids if len(set(ids)) > LEAST_TOKENS else list(range(min(len(tokenizer), TOKENS)))


def max_positions(model: str) -> int:
    """``max_position_embeddings`` of the checkpoint's config."""
    return read_model_config(model).get_text_config().max_position_embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What vLLM divides over GPUs: attention heads, those of keys and values, the width of the MLP."""

    heads: int
    key_value_heads: int
    intermediate_size: int | None = None

    def divides(self, size: int) -> bool:
        """Whether vLLM can split the layers over ``size`` GPUs; it copies heads of keys and values."""
        groups = self.key_value_heads
        return (
            self.heads % size == 0
            and (groups % size == 0 or size % groups == 0)
            and (self.intermediate_size or 0) % size == 0
        )

    def require(self, model: str, size: int) -> None:
        """ValueError, with the sizes that are allowed, unless the layers of ``model`` can be split so."""
        if not self.divides(size):
            allowed = [str(n) for n in range(1, self.heads + 1) if self.divides(n)]
            raise ValueError(
                f"teacher.tensor_parallel_size={size} does not divide the {self.heads} attention heads "
                f"({self.key_value_heads} of keys and values) and the MLP of {model}: allowed are "
                f"{', '.join(allowed)}"
            )


def read_layer_shape(model: str) -> LayerShape | None:
    """What a checkpoint's config says about heads and MLP; None where it names no heads."""
    text = read_model_config(model).get_text_config().to_dict()
    heads, width = text.get("num_attention_heads"), text.get("intermediate_size")
    if heads is None:
        return None
    return LayerShape(
        heads=heads,
        key_value_heads=text.get("num_key_value_heads") or heads,
        intermediate_size=width if isinstance(width, int) else None,
    )


def require_divisible_heads(model: str, tensor_parallel_size: int) -> None:
    """ValueError unless a model's layers can be divided over so many GPUs, as vLLM divides them."""
    shape = read_layer_shape(model)
    if shape is not None:
        shape.require(model, tensor_parallel_size)


def read_head(model: str) -> torch.Tensor:
    """The output head [V, D], float32, as transformers loads it from the checkpoint's files.

    It is ``lm_head.weight``, under any prefix; where the checkpoint has none and ties it to the input
    embedding, that is read. ``ValueError`` for a head that is not a plain matrix.
    """
    checkpoint = open_checkpoint(model)
    names = _names_ending(checkpoint, HEADS)
    if not names and is_tied(model_folder(model)):
        names = _names_ending(checkpoint, EMBEDDINGS)
    if len(names) != 1:
        raise ValueError(
            f"{model}: expected one tensor named {' or '.join(HEADS + EMBEDDINGS)} to use as the "
            f"output head and found {names or 'none'}; use an unquantised causal language model"
        )
    bias = names[0].removesuffix("weight") + "bias"
    if bias in checkpoint:
        raise ValueError(f"{model}: the output head has a bias ({bias}), which is not supported")
    return checkpoint[names[0]].read().float()


def checkpoint_bytes(model: str) -> int:
    """Bytes of the weights as stored."""
    return sum(t.numel * t.dtype.itemsize for t in open_checkpoint(model).values())


def _names_ending(names: Iterable[str], endings: tuple[str, ...]) -> list[str]:
    return [n for n in names for end in endings if n == end or n.endswith(f".{end}")]
