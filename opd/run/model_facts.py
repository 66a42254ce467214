"""Sizes of a model from its config alone: the model is built without storage, no weight is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from opd.checkpoint.files import split_revision
from opd.config.adapter import ALL_LINEAR, LoraConfig
from opd.model_head import head_spec, skeleton
from opd.run.hub import hub_answers
from opd.run.model_names import resolved_model

TABLE = Path(__file__).parent / "model_configs.json"
"""What the config.json of common models on the Hugging Face Hub says about sizes, by hub id. Sources: those
files, litgpt's config.py; checked by the published parameter counts (tests/unit/run/test_model_facts.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Counts of numbers, not of bytes.

    ``parameters`` counts a tied head once. ``embedding`` and ``head`` are the input embedding and the output
    head, the same tensor where ``tied``. ``linear`` is all that is multiplied with every token, the head left
    out. ``largest`` is the largest tensor, ``layer`` the largest decoder layer. ``norm_heads``: queries and
    keys are normalised too. ``dtype`` is the checkpoint's; ``softcap``: the head caps its logits.
    ``lora`` is the size of adapters of rank 1 for each linear module, by its name.
    """

    name: str
    parameters: int
    embedding: int
    head: int
    tied: bool
    linear: int
    largest: int
    layer: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    norm_heads: bool
    dtype: str
    softcap: bool
    lora: Mapping[str, int]

    @property
    def attention(self) -> int:
        """Width of the queries of a token."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of the keys of a token, and of its values."""
        return self.kv_heads * self.head_dim

    def adapters(self, config: LoraConfig) -> int:
        """Numbers in the adapters of a LoRA configuration: r (inputs + outputs) for each module."""
        targets = config.targets
        if targets == ALL_LINEAR:
            return config.r * sum(self.lora.values())
        return config.r * sum(
            size
            for name, size in self.lora.items()
            if any(name == target or name.endswith(f".{target}") for target in targets)
        )


@cache
def read_facts(model: str, *, trust_remote_code: bool = False) -> ModelFacts:
    """The sizes of a folder, a run folder, or a hub id.

    A hub id is looked up in the local cache of the hub, in ``TABLE``, and at last on the hub. Raises
    ValueError with one sentence when its config cannot be had.
    """
    config = _read_config(model, trust_remote_code)
    causal = skeleton(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    plain = text.to_dict()
    inputs, outputs = causal.get_input_embeddings(), causal.get_output_embeddings()
    layers = _largest_list(causal)
    heads = int(plain["num_attention_heads"])
    sizes = [parameter.numel() for parameter in causal.parameters()]
    return ModelFacts(
        name=model,
        parameters=sum(sizes),
        embedding=inputs.weight.numel(),
        head=outputs.weight.numel(),
        tied=outputs.weight is inputs.weight,
        linear=sum(p.numel() for layer in layers for p in layer.parameters() if p.ndim > 1),
        largest=max(sizes),
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        layers=len(layers),
        hidden=outputs.in_features,
        intermediate=int(plain.get("intermediate_size") or 4 * outputs.in_features),
        heads=heads,
        kv_heads=int(plain.get("num_key_value_heads") or heads),
        head_dim=int(plain.get("head_dim") or text.hidden_size // heads),
        vocab=int(text.vocab_size),
        norm_heads=any(name.endswith("q_norm.weight") for name, _ in causal.named_parameters()),
        dtype=str(text.dtype or config.dtype or "float32").removeprefix("torch."),
        softcap=head_spec(config, trust_remote_code=trust_remote_code).softcap is not None,
        lora={
            name: module.in_features + module.out_features
            for name, module in causal.named_modules()
            if isinstance(module, nn.Linear) and module is not outputs
        },
    )


def _read_config(model: str, trust_remote_code: bool) -> PreTrainedConfig:
    folder = Path(resolved_model(model))
    if folder.is_dir():
        return _from_pretrained(str(folder), trust_remote_code)
    name, revision = split_revision(model)
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        raise _unknown(model, "that is no name on it") from None
    if isinstance(cached, str):
        return _from_pretrained(str(Path(cached).parent), trust_remote_code)
    known: dict[str, dict[str, Any]] = json.loads(TABLE.read_text())
    if name in known:
        return AutoConfig.for_model(**known[name])
    return _from_pretrained(model, trust_remote_code, local_files_only=not hub_answers())


def _from_pretrained(
    model: str, trust_remote_code: bool, *, local_files_only: bool = True
) -> PreTrainedConfig:
    try:
        name, revision = split_revision(model)
        return AutoConfig.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=local_files_only,
        )
    except Exception as error:  # each family of models refuses its settings in its own way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _unknown(model, reason) from None


def _unknown(model: str, reason: str) -> ValueError:
    return ValueError(
        f"the config.json of {model} is neither in a folder of this name nor in the cache of the hub, opd "
        f"does not know its sizes, and the hub cannot be asked ({reason}): give a folder that has one"
    )


def _largest_list(causal: nn.Module) -> nn.ModuleList:
    """The decoder's layers: the list of modules with the most parameters."""
    lists = [module for module in causal.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
