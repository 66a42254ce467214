"""The student's weights under their Hugging Face names: loaded, listed, gathered, exported."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from transformers import AutoModelForCausalLM

from opd.config.adapter import LoraConfig
from opd.config.student import AUTO_ATTENTION, StudentConfig
from opd.reference import TOKENS as PROBE_TOKENS
from opd.reference import use_faithful_attention
from opd.train.compact import dense_parameters
from opd.train.student import causal_lm

NOISE = re.compile(r"drop(out|_prob|$)|pdrop|jitter")
"""Attributes of modules that are rates of noise in training."""
Gathered = Callable[[Sequence[torch.nn.Parameter]], AbstractContextManager[None]]


def load_student(model: str, config: StudentConfig, *, dtype: torch.dtype) -> torch.nn.Module:
    """The causal language model ``model`` of transformers with every weight in ``dtype``.

    Raises ValueError for a model or an attention that transformers cannot load.
    """
    auto = config.attn_implementation == AUTO_ATTENTION
    try:
        student = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            attn_implementation=None if auto else config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
        )
    except (ImportError, ValueError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"student.model={model} cannot be loaded ({first})") from error
    if auto:
        use_faithful_attention(student, range(PROBE_TOKENS))
    return student


def disable_dropout(model: torch.nn.Module) -> None:
    """Set every dropout and every noise of a router to 0, so that training mode computes the same model.

    transformers keeps rates in modules (``nn.Dropout``) and in attributes (``attention_dropout``,
    ``hidden_dropout``, ``router_jitter_noise``).
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and NOISE.search(name):
                setattr(module, name, 0.0)


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
    """(name, full tensor) of each weight once, tied ones under the input's name, adapters merged.

    Tensors are gathered a decoder layer at a time, so that the parts of a fused module come
    together. A consumer may keep a tensor after the iterator has moved on. Every rank must exhaust the
    iterator.
    """
    modules = list(_weight_modules(causal_lm(model)))
    for _, layer in groupby(modules, key=lambda m: layer_key(m[0])):
        owned = list(layer)
        with torch.no_grad(), gathered([p for _, m in owned for p in _parameters(m)]):
            for name, module in owned:
                yield from _module_weights(name, module)


def named_weights(causal: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, dense parameter) of each weight once, in the order of ``full_weights``; no adapters."""
    for name, module in _weight_modules(causal):
        for leaf, parameter in dense_parameters(module):
            yield f"{name}.{leaf}", parameter


def layer_key(name: str) -> str:
    """The key of weights that are gathered together: the name up to the layer's number."""
    head, dot, _ = name.partition(".layers.")
    return f"{head}{dot}{name[len(head) + len(dot) :].split('.')[0]}" if dot else name


def _weight_modules(causal: Any) -> Iterator[tuple[str, Any]]:
    """Modules that own weights, a peft layer counting as one; a tied head is left out."""
    from peft.tuners.lora import LoraLayer

    adapters: list[str] = []
    seen: set[int] = set()
    for name, module in causal.named_modules():
        if ".parametrizations" in name or any(name.startswith(f"{a}.") for a in adapters):
            continue
        own = _parameters(module)
        if not own or id(own[0]) in seen:
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
    from peft.tuners.lora import Linear as LoraLinear

    if not isinstance(module, LoraLinear):
        for leaf, parameter in dense_parameters(module):
            yield f"{name}.{leaf}", parameter.detach()
        return
    base = module.get_base_layer()
    for leaf, parameter in base.named_parameters():
        if leaf == "weight":
            deltas = [module.get_delta_weight(a) for a in module.active_adapters]
            yield f"{name}.{leaf}", sum(deltas, parameter.detach())
        else:
            yield f"{name}.{leaf}", parameter.detach()


def export(
    weights: Iterable[tuple[str, torch.Tensor]],
    model: torch.nn.Module,
    tokenizer: Any,
    folder: Path,
) -> None:
    """Write a plain Hugging Face checkpoint that transformers and vLLM load; shards of at most 5 GB."""
    causal = causal_lm(model)
    state = {name: tensor.to("cpu", copy=True) for name, tensor in weights}
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(state, folder)
    causal.config.dtype = next(iter(state.values())).dtype
    causal.config.save_pretrained(folder)
    if causal.generation_config is not None:
        causal.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
