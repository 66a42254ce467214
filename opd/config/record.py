"""``record``: measurements of the weights during training."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd.config.adapter import LoraConfig
from opd.config.fields import bounded
from opd.config.launch import LaunchEngine

if TYPE_CHECKING:
    from opd.config.schema import Config


@dataclass(kw_only=True, slots=True)
class RecordConfig:
    """No measurements of the weights."""


@dataclass(kw_only=True, slots=True)
class WeightRecordConfig(RecordConfig):
    """The distance of the weights from their initial values, written to weights.jsonl."""

    every: int = bounded(10, least=1)
    """Steps between recordings; the start and the last step are always recorded."""


CHOICES = {"none": RecordConfig, "weights": WeightRecordConfig}


def a_recorded_run_has_master_weights(config: "Config") -> str | None:
    """The record reads master weights and moments of the student's own parameters."""
    if not isinstance(config.record, WeightRecordConfig):
        return None
    if isinstance(config.adapter, LoraConfig):
        return (
            "record=weights reads the student's own weights and adapter=lora freezes them: use "
            "adapter=none, or record=none"
        )
    if config.zero == 0 and config.launch.engine == LaunchEngine.deepspeed:
        return "record=weights needs zero=1, 2 or 3 (or launch.engine=torch), found zero=0"
    return None


RULES = (a_recorded_run_has_master_weights,)
