"""``adapter``: low-rank adapters. Settings carry peft's names."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.config.fields import bounded

if TYPE_CHECKING:
    from opd.config.schema import Config


ALL_LINEAR = "all-linear"


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
    """Dropout before the adapter; needs train.dropout=true, and the engine has none."""
    target_modules: str = ALL_LINEAR
    """Module names, comma-separated, or all-linear."""

    @property
    def targets(self) -> list[str] | str:
        """The module names, or all-linear."""
        if self.target_modules.strip() == ALL_LINEAR:
            return ALL_LINEAR
        return [name for part in self.target_modules.split(",") if (name := part.strip())]


def adapters_have_targets(config: "Config") -> str | None:
    """An adapter without a module trains nothing."""
    adapter = config.adapter
    if isinstance(adapter, LoraConfig) and not adapter.targets:
        return (
            f"adapter.target_modules={adapter.target_modules!r} names no module: name some, "
            f"comma-separated, or {ALL_LINEAR}"
        )
    return None


def lora_dropout_needs_dropout(config: "Config") -> str | None:
    """Training is without dropout unless it is asked for."""
    adapter = config.adapter
    if isinstance(adapter, LoraConfig) and adapter.lora_dropout and not config.train.dropout:
        return (
            f"adapter.lora_dropout={adapter.lora_dropout:g} has no effect while train.dropout is false: set "
            "train.dropout=true, or adapter.lora_dropout=0"
        )
    return None


RULES = (
    adapters_have_targets,
    lora_dropout_needs_dropout,
)
CHOICES = {"none": AdapterConfig, "lora": LoraConfig}
