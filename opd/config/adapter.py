"""``adapter``: low-rank adapters. Settings carry peft's names."""

from dataclasses import dataclass

from opd.config.fields import bounded


@dataclass(kw_only=True, slots=True)
class AdapterConfig:
    """No adapters: the student's own weights are trained."""


@dataclass(kw_only=True, slots=True)
class LoraConfig(AdapterConfig):
    """Low-rank adapters (peft)."""

    r: int = bounded(16, least=1)
    """Rank of the update."""
    lora_alpha: float = bounded(32.0, above=0)
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = bounded(0.0, least=0, below=1)
    """Dropout before the adapter; above 0 the learner's log-probs differ from the engine's."""
    target_modules: str = "all-linear"
    """Module names, comma-separated, or all-linear."""


CHOICES = {"none": AdapterConfig, "lora": LoraConfig}
