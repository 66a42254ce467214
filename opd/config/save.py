"""``save``: checkpoints."""

from dataclasses import dataclass

from opd.config.fields import bounded


@dataclass(kw_only=True, slots=True)
class SaveConfig:
    """Which checkpoints are kept."""

    every: int = bounded(50, least=0)
    """Steps between checkpoints; 0: only after the last step."""
    keep: int = bounded(2, least=1)
    """Number of newest checkpoints to keep."""
