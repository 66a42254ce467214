"""What transformers knows of a checkpoint's architecture: tied weights, buffers, names in memory.

Nothing here lists families. The model is built from its ``config.json`` without weights, and asked.
"""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

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
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from opd.checkpoint.files import config_folder, model_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model of transformers on the meta device, and its conversions of names and tensors.

    ``known`` holds the names of its parameters (True) and buffers (False) in memory; ``merged`` takes
    tensors of memory apart that files hold in parts, and ``fused`` those of files that memory holds
    in parts. A conversion of the layout alone is in both.
    """

    model: PreTrainedModel
    renamings: tuple[WeightRenaming, ...]
    converters: tuple[WeightConverter, ...]
    merged: tuple[WeightConverter, ...]
    fused: tuple[WeightConverter, ...]
    known: dict[str, bool]

    def renamed(self, name: str) -> str:
        """A stored tensor's name in memory, before tensors are merged, split or transposed."""
        prefix = self.model.base_model_prefix
        return rename_source_key(name, list(self.renamings), [], prefix, self.known)[0]

    def conversion(self, name: str, shape: tuple[int, ...]) -> "Conversion | None":
        """How to take a tensor apart, by its name from ``renamed``; None when there is nothing to do.

        A tensor that memory holds merged (stacked experts) becomes those that files hold. One that
        files hold fused or transposed becomes those of memory.
        """
        for converter in self.merged if name in self.known else self.fused:
            target, pattern = converter.rename_source_key(name)
            if pattern is None:
                continue
            conversion = Conversion(self.model, converter, name, target, pattern)
            try:
                found = conversion.apply(torch.empty(shape, device="meta"))
            except Exception:  # a tensor of another shape than the family's own
                return None
            conversion.shapes.update({part: tuple(t.shape) for part, t in found.items()})
            return conversion
        return None

    def is_parameter(self, name: str) -> bool:
        """Whether loading puts a stored tensor into a parameter: not for buffers and leftovers."""
        return self.known.get(self._loaded(name), False)

    def with_prefix(self, name: str) -> str:
        """A stored tensor's name with the prefix of the base model, as transformers writes it.

        Files of a model without its head (``h.0.ln_1.weight`` of GPT-2 on the Hub) leave the prefix out.
        Names that loading changes otherwise, or does not know, are left as they are.
        """
        prefix = self.model.base_model_prefix
        if name in self.known or name.startswith(f"{prefix}."):
            return name
        prefixed, loaded = f"{prefix}.{name}", self._loaded(name)
        is_left_out = self.renamed(name) in (name, prefixed) and loaded in self.known
        return prefixed if is_left_out and loaded == self._loaded(prefixed) else name

    def _loaded(self, name: str) -> str:
        """The name in memory of the tensor that a stored one is loaded into, merged or not."""
        renamings, converters = list(self.renamings), list(self.converters)
        prefix = self.model.base_model_prefix
        return rename_source_key(name, renamings, converters, prefix, self.known)[0]

    def ties(self, names: Iterable[str]) -> dict[str, str]:
        """(tied tensor, the tensor it shares) by names in memory, under the names that are stored."""
        stored = {self.renamed(name): name for name in names}
        in_memory: dict[str, str] = self.model.all_tied_weights_keys
        return {stored.get(a, a): stored.get(b, b) for a, b in in_memory.items()}


@dataclass(frozen=True, slots=True)
class Conversion:
    """One tensor as several, or in another layout, by a conversion of transformers.

    ``shapes`` holds those of the results by name.
    """

    model: PreTrainedModel
    converter: WeightConverter
    source: str
    target: str
    pattern: str
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def apply(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The results by name; views of ``tensor`` where the conversion only splits."""
        converter = deepcopy(self.converter)
        # saving gives tensors, loading futures of them
        converter.add_tensor(self.target, self.source, self.pattern, tensor)  # pyright: ignore[reportArgumentType]
        found = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: part[0] if isinstance(part, list) else part for name, part in found.items()}


def read_family(folder: Path) -> Family | None:
    """The architecture of a model folder; None without a config that transformers knows.

    No code of the folder is run.
    """
    found = config_folder(folder)
    if found is None:
        return None
    return _family(found, (found / "config.json").read_text())


def is_tied(folder: Path) -> bool:
    """Whether a model ties its head to its embedding: by its config, or by its family's default.

    The config.json answers alone where transformers does not know the family.
    """
    found = config_folder(folder)
    known = None if found is None else _config(found, (found / "config.json").read_text())
    if known is not None:
        return bool(known.to_dict().get("tie_word_embeddings", False))
    config = model_config(folder)
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _merges(converter: WeightConverter) -> bool:
    """Whether loading makes one tensor of several."""
    stacks = any(isinstance(operation, MergeModulelist) for operation in converter.operations)
    return stacks or len(converter.source_patterns) > 1


def _reversed(converter: WeightConverter) -> WeightConverter:
    found = converter.reverse_transform()
    assert isinstance(found, WeightConverter)
    return found


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
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    return Family(
        model=model,
        renamings=tuple(each for each in conversions if isinstance(each, WeightRenaming)),
        converters=tuple(converters),
        merged=(
            *(_reversed(each) for each in converters if _merges(each)),
            *(each for each in converters if each.source_patterns == each.target_patterns),
        ),
        fused=tuple(each for each in converters if not _merges(each)),
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
