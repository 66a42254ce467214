"""``tracking``: trackers besides the run folder and the terminal."""

from dataclasses import dataclass
from enum import StrEnum


class WandbMode(StrEnum):
    online = "online"
    offline = "offline"


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Metrics go to the run folder and the terminal only."""


@dataclass(kw_only=True, slots=True)
class WandbConfig(TrackingConfig):
    """Weights & Biases."""

    project: str = "opd"
    """Project name."""
    mode: WandbMode = WandbMode.online
    """offline writes into the run folder and needs no network."""


CHOICES = {"none": TrackingConfig, "wandb": WandbConfig}
