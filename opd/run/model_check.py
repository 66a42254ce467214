"""Checks of the student's architecture and adapters that need its config only."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from opd.config.adapter import ALL_LINEAR, LoraConfig
from opd.config.schema import Config
from opd.config.student import AUTO_ATTENTION
from opd.model_head import decoder, head_spec, read_model_config, skeleton
from opd.train.weights import DROPOUT, JITTER


def check_student_model(config: Config) -> list[str]:
    """Likely errors, one sentence each. Raises ValueError for an architecture that cannot be trained.

    That is one that transformers cannot build, one whose head is not supported, and adapters for modules
    that it does not have.
    """
    student = config.student
    model_config = read_model_config(
        student.model, setting="student.model", trust_remote_code=student.trust_remote_code
    )
    quantised = model_config.to_dict().get("quantization_config")
    if quantised:
        raise ValueError(
            f"student.model={student.model} is quantised "
            f"({quantised.get('quant_method', 'unknown method')}): training needs plain weights; dequantise "
            "it first, or take the model that it was made from"
        )
    attention = student.attn_implementation
    try:
        causal = skeleton(
            model_config,
            attn_implementation=None if attention == AUTO_ATTENTION else attention,
            trust_remote_code=student.trust_remote_code,
        )
        decoder(causal)
        head_spec(model_config, trust_remote_code=student.trust_remote_code)
    except ValueError as error:
        raise ValueError(f"student.model={student.model}: {error}") from None
    if isinstance(config.adapter, LoraConfig):
        _require_targets(config.adapter, causal)
    return [] if config.train.dropout else list(_unused_dropout(model_config.to_dict()))


def _require_targets(adapter: LoraConfig, causal: Any) -> None:
    """ValueError for a target that is no module, or whose adapter would not be in the trained model."""
    targets = adapter.targets
    if targets == ALL_LINEAR:
        return
    modules: Mapping[str, nn.Module] = dict(causal.named_modules())
    tied = causal.get_output_embeddings().weight is causal.get_input_embeddings().weight
    for target in targets:
        matched = [
            m for name, m in modules.items() if name == target or name.endswith(f".{target}")
        ]
        if not matched:
            leaves = sorted({n.rpartition(".")[2] for n, m in modules.items() if _is_linear(m)})
            raise ValueError(
                f"adapter.target_modules names {target!r}, which the student does not have: it has "
                f"{', '.join(leaves)}"
            )
        if causal.get_output_embeddings() in matched:
            raise ValueError(
                f"adapter.target_modules names the output head {target!r}, which is applied as a plain "
                "matrix without adapters: leave it out"
            )
        inputs = causal.get_input_embeddings()
        if any(isinstance(m, nn.Embedding) and m is not inputs for m in matched):
            raise ValueError(
                f"adapter.target_modules names {target!r}, a table of positions, for which there are no "
                "adapters: leave it out"
            )
        if inputs in matched and tied:
            raise ValueError(
                f"adapter.target_modules names the embedding {target!r}, which is tied to the output head: "
                "an adapter would change only one of them; leave it out"
            )


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"


def _unused_dropout(settings: Mapping[str, Any]) -> Iterator[str]:
    """One sentence when the model's config has dropout, which training leaves out."""
    rates = {
        name: value
        for name, value in {**settings, **(settings.get("text_config") or {})}.items()
        if (DROPOUT.search(name) or JITTER.search(name)) and isinstance(value, float) and value > 0
    }
    if rates:
        listed = ", ".join(f"{name}={value:g}" for name, value in sorted(rates.items()))
        yield (
            f"the student's config has {listed}, and training is without dropout, as generation is; "
            "train.dropout=true turns it on"
        )
