"""The student's weights under their Hugging Face names: loaded, listed, gathered, exported."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from opd.checkpoint.full_disk import full_disk_explained
from opd.checkpoint.whole_folder import whole_folder
from opd.config.adapter import LoraConfig
from opd.config.student import AUTO_ATTENTION, StudentConfig
from opd.reference import TOKENS as PROBE_TOKENS
from opd.reference import load_whole, use_faithful_attention
from opd.train.checkpoint_layout import (
    CheckpointLayout,
    layer_key,
    own_stored_buffers,
    stored_buffers,
    to_checkpoint,
)
from opd.train.compact import dense_parameters, full_shape
from opd.train.float32 import float32_layers
from opd.train.student import causal_lm

DROPOUT = re.compile(r"drop(out|_prob|$)|pdrop")
"""Attributes of modules that are rates of dropout."""
JITTER = re.compile(r"jitter")
"""Those of routers that are random in training. PhiMoE routes by its rate in evaluation too."""
Gathered = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[None]]


def load_student(model: str, config: StudentConfig, *, dtype: torch.dtype) -> torch.nn.Module:
    """The causal language model ``model`` of transformers with every weight in ``dtype``.

    Raises ValueError for a model or an attention that transformers cannot load, and for missing tensors.
    """
    student = load_weights(model, config, dtype=dtype)
    choose_attention(student, config)
    return student


def load_weights(model: str, config: StudentConfig, *, dtype: torch.dtype) -> torch.nn.Module:
    """``load_student`` before its attention is chosen."""
    auto = config.attn_implementation == AUTO_ATTENTION
    return load_whole(
        model,
        f"student.model={model}",
        dtype=dtype,
        attn_implementation=None if auto else config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )


def choose_attention(student: torch.nn.Module, config: StudentConfig) -> None:
    """Switch to eager attention where the recipe leaves the choice and the default is unfaithful."""
    if config.attn_implementation == AUTO_ATTENTION:
        with float32_layers(student):
            use_faithful_attention(student, range(PROBE_TOKENS), dtype=torch.float32)


def disable_dropout(model: torch.nn.Module) -> None:
    """Make training mode compute the model that evaluation computes: no dropout, no noise of a router.

    transformers keeps rates in modules (``nn.Dropout``) and in attributes (``attention_dropout``,
    ``hidden_dropout``), which are set to 0. Routers with noise stay in evaluation mode instead.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        rates = {name for name, value in vars(module).items() if isinstance(value, float)}
        for name in filter(DROPOUT.search, rates):
            setattr(module, name, 0.0)
        if any(map(JITTER.search, rates)):
            module.eval()
            module.train = partial(_stay, module)  # pyright: ignore[reportAttributeAccessIssue]


def _stay(module: torch.nn.Module, mode: bool = True) -> torch.nn.Module:
    """In place of a module's ``train``: its mode does not change."""
    return module


def with_lora(student: Any, config: LoraConfig) -> torch.nn.Module:
    """The student, frozen, with new low-rank adapters (Hu et al., LoRA), which start at zero."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    return get_peft_model(
        student,
        PeftLoraConfig(
            task_type="CAUSAL_LM",
            r=config.r,
            lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  (a float is fine)
            lora_dropout=config.lora_dropout,
            target_modules=config.targets,
        ),
    )


def full_weights(model: torch.nn.Module, gathered: Gathered) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, full tensor) of each weight and stored buffer once, under the checkpoint's names.

    Tied ones have the input's name, adapters are merged. Tensors are gathered a decoder layer at a time,
    so that the parts of a fused module come together. A consumer may keep a tensor after the iterator
    has moved on. Every rank must exhaust the iterator.
    """
    causal = causal_lm(model)
    for _, layer in groupby(_weight_modules(causal), key=lambda m: layer_key(m[0])):
        owned = list(layer)
        with torch.no_grad(), gathered([p for _, m in owned for p in _parameters(m)]):
            held = {
                name: tensor
                for prefix, module in owned
                for name, tensor in _module_weights(prefix, module)
            }
            yield from to_checkpoint(causal, held).items()


def named_weights(causal: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name in memory, dense parameter) of each weight once, layer by layer; no adapters, no buffers."""
    for name, module in _weight_modules(causal):
        for leaf, parameter in dense_parameters(module):
            yield f"{name}.{leaf}", parameter


def checkpoint_layout(causal: torch.nn.Module) -> CheckpointLayout:
    """Where the weights of the checkpoint lie in the parameters of ``named_weights``."""
    return CheckpointLayout(causal, {name: full_shape(p) for name, p in named_weights(causal)})


def checkpoint_views(causal: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's own weights and stored buffers under the names of its checkpoint, for writing into.

    Raises ValueError where a tensor of the checkpoint is no regular part of one in memory.
    """
    tensors = {name: parameter.detach() for name, parameter in named_weights(causal)}
    buffers = to_checkpoint(causal, dict(stored_buffers(causal)))
    return {**dict(checkpoint_layout(causal).views(tensors)), **buffers}


FLIPPED = {
    torch.float32: (torch.int32, 1 << 19),
    torch.float16: (torch.int16, 1 << 6),
    torch.bfloat16: (torch.int16, 1 << 3),
}
"""Formats as integers, and the bit of the mantissa that stands for 1/16."""


def flip_bit(tensor: torch.Tensor) -> None:
    """Change every number by 1/16 of its power of two, in place; twice is no change. Zero stays nearly 0.

    Other formats are left as they are.
    """
    if tensor.dtype in FLIPPED:
        integers, bit = FLIPPED[tensor.dtype]
        tensor.detach().view(integers).bitwise_xor_(bit)


def _weight_modules(causal: Any) -> Iterator[tuple[str, Any]]:
    """Modules that own weights or stored buffers, a peft layer counting as one; a tied head is left out."""
    from peft.tuners.lora import LoraLayer

    adapters: list[str] = []
    seen: set[int] = set()
    for name, module in causal.named_modules():
        if ".parametrizations" in name or any(name.startswith(f"{a}.") for a in adapters):
            continue
        own = _parameters(module)
        buffers = any(True for _ in own_stored_buffers(module))
        if not (own or buffers) or (own and id(own[0]) in seen):
            continue
        seen.update(map(id, own))
        if isinstance(module, LoraLayer):
            adapters.append(name)
        yield name, module


def _parameters(module: Any) -> list[torch.nn.Parameter]:
    """Parameters that a module owns itself; of a peft layer, those of its adapters too."""
    from peft.tuners.lora import LoraLayer

    if isinstance(module, LoraLayer):
        return list(module.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    return [parameter for _, parameter in dense_parameters(module)]


def _module_weights(name: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a module's weights, adapters merged."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer):
        for leaf, parameter in dense_parameters(module):
            yield f"{name}.{leaf}", parameter.detach()
        for leaf, buffer in own_stored_buffers(module):
            yield f"{name}.{leaf}", buffer
        return
    updates = _adapter_updates(module)
    base = module.get_base_layer()
    for leaf, parameter in base.named_parameters():
        yield f"{name}.{leaf}", sum(updates.get(leaf, ()), start=parameter.detach())
    for leaf, buffer in stored_buffers(base):
        yield f"{name}.{leaf}", buffer


def _adapter_updates(layer: Any) -> dict[str, list[torch.Tensor]]:
    """What the adapters of a peft layer add to each parameter of the layer inside it.

    peft wraps the fused experts of a mixture once for each parameter, one wrapper around the other.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    updates: dict[str, list[torch.Tensor]] = {}
    while isinstance(layer, LoraLayer):
        leaf = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        found = [layer.get_delta_weight(adapter) for adapter in layer.active_adapters]  # pyright: ignore
        updates.setdefault(leaf, []).extend(found)
        layer = layer.base_layer
    return updates


def _end_tokens(own: int | list[int] | None, more: Sequence[int]) -> int | list[int] | None:
    """``own``, and those of ``more`` that it lacks behind them."""
    listed = own if isinstance(own, list) else [] if own is None else [own]
    added = [i for i in more if i not in listed]
    return [*listed, *added] if added else own


def export(
    weights: Iterable[tuple[str, torch.Tensor]],
    model: torch.nn.Module,
    tokenizer: Any,
    folder: Path,
    *,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a plain Hugging Face checkpoint that transformers and vLLM load; shards of at most 5 GB.

    The folder appears when all of it is written. Its generation config ends completions at its own end
    tokens and at ``stop_ids``, which ended those that the model has learned from.
    """
    causal = causal_lm(model)
    state = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in weights}
    needed = sum(tensor.nbytes for tensor in state.values())
    remedy = "free some space, and the same command writes it from the last checkpoint"
    with (
        full_disk_explained("the final model", folder, needed=needed, remedy=remedy),
        whole_folder(folder) as partial,
    ):
        save_torch_state_dict(state, partial)
        causal.config.dtype = next(iter(state.values())).dtype
        causal.config.save_pretrained(partial)
        if causal.generation_config is not None:
            generation = copy.deepcopy(causal.generation_config)
            generation.eos_token_id = _end_tokens(generation.eos_token_id, stop_ids)
            generation.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
