"""What transformers knows of a checkpoint's architecture: tied weights, buffers, names in memory.

Nothing here lists families. The model is built from its ``config.json`` without weights, and asked.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from opd.checkpoint.files import config_folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model of transformers on the meta device, and its conversions of names and tensors.

    ``known`` holds the names of its parameters (True) and buffers (False) in memory.
    """

    model: PreTrainedModel
    renamings: tuple[WeightRenaming, ...]
    converters: tuple[WeightConverter, ...]
    known: dict[str, bool]

    def renamed(self, name: str) -> str:
        """A stored tensor's name in memory, before tensors are merged, split or transposed."""
        prefix = self.model.base_model_prefix
        return rename_source_key(name, list(self.renamings), [], prefix, self.known)[0]

    def is_parameter(self, name: str) -> bool:
        """Whether a stored tensor is trained: no buffer, and nothing that the model ignores."""
        renamed = self.renamed(name)
        if renamed in self.known:
            return self.known[renamed]
        patterns = self.model._keys_to_ignore_on_load_unexpected or ()
        return not any(re.search(pattern, renamed) for pattern in patterns)

    def ties(self, names: Iterable[str]) -> dict[str, str]:
        """(tied tensor, the tensor it shares) by names in memory, under the names that are stored."""
        stored = {self.renamed(name): name for name in names}
        in_memory: dict[str, str] = self.model.all_tied_weights_keys
        return {stored.get(a, a): stored.get(b, b) for a, b in in_memory.items()}


def read_family(folder: Path) -> Family | None:
    """The architecture of a model folder; None without a config that transformers knows.

    No code of the folder is run.
    """
    found = config_folder(folder)
    if found is None:
        return None
    return _family(found, (found / "config.json").read_text())


def ties_embeddings(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a model ties its head to its embedding: by its config, or by its family's default.

    ``config`` is its config.json, which answers alone where transformers does not know the family.
    """
    found = config_folder(folder)
    known = None if found is None else _config(found, (found / "config.json").read_text())
    if known is not None:
        return bool(known.to_dict().get("tie_word_embeddings", False))
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


@lru_cache(maxsize=8)
def _config(folder: Path, _content: str) -> PretrainedConfig | None:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # an unknown family, its own code, or settings that the family refuses
        return None


@lru_cache(maxsize=4)
def _family(folder: Path, content: str) -> Family | None:
    config = _config(folder, content)
    try:
        model = None if config is None else _without_weights(config)
    except Exception:  # settings with which the family cannot be built
        return None
    if model is None:
        return None
    conversions = get_model_conversion_mapping(model)
    return Family(
        model=model,
        renamings=tuple(each for each in conversions if isinstance(each, WeightRenaming)),
        converters=tuple(each for each in conversions if isinstance(each, WeightConverter)),
        known=dict.fromkeys((name for name, _ in model.named_buffers()), False)
        | dict.fromkeys((name for name, _ in model.named_parameters(remove_duplicate=False)), True),
    )


def _without_weights(config: PretrainedConfig) -> PreTrainedModel | None:
    """The language model of a config, with its vision tower if it has one; None for other models."""
    with torch.device("meta"):
        for mapping, auto in (
            (MODEL_FOR_MULTIMODAL_LM_MAPPING, AutoModelForMultimodalLM),
            (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        ):
            if type(config) in mapping:
                return auto.from_config(config, attn_implementation="eager")
    return None
