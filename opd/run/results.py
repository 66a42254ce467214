"""A run folder as a Python object, for notebooks."""

from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from opd.run.folder import CONFIG, DRY_RUN
from opd.tracking.jsonl import METRICS, SAMPLES, read_lines
from opd.tracking.report import write_report
from opd.tracking.runs import RunRecord, read_description, read_run
from opd.train.checkpoints import checkpoints


class Run:
    """A run folder: ``Run("runs/quickstart").metrics``.

    Files are read when an attribute is used. Raises ValueError when the folder is not that of a run.
    A dry run has a configuration and nothing else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self._is_started and not (self.folder / DRY_RUN).is_file():
            raise ValueError(f"{folder}: found no {CONFIG}; give the folder that `opd train` wrote")

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"

    @property
    def _is_started(self) -> bool:
        return (self.folder / CONFIG).is_file()

    @cached_property
    def record(self) -> RunRecord:
        """Configuration, rows and transcripts as the reports read them."""
        return read_run(self.folder)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def status(self) -> str:
        """``finished``, ``dry run``, or what went wrong in a few words."""
        return self.record.status if self._is_started else "dry run"

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; of a dry run, the one that would be used."""
        return read_description(self.folder / (CONFIG if self._is_started else DRY_RUN))["config"]

    @property
    def metrics(self) -> pd.DataFrame:
        """One row a step, one column a metric; step 0 is the evaluation before training."""
        return _frame(self.folder / METRICS)

    @property
    def samples(self) -> pd.DataFrame:
        """Transcripts of the evaluations, one row each."""
        return _frame(self.folder / SAMPLES)

    @property
    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return checkpoints(self.folder)

    @property
    def final(self) -> Path:
        """The folder of the trained model, a plain Hugging Face checkpoint; ValueError before it is there."""
        folder = self.folder / "final"
        if not (folder / "config.json").is_file():
            raise ValueError(f"the run {self.folder} has no final/ yet: let it finish")
        return folder

    def report(self) -> Path:
        """Rewrite report.html and return its path."""
        return write_report(self.folder)


def _frame(path: Path) -> pd.DataFrame:
    rows = pd.DataFrame(read_lines(path))
    return rows.set_index("step") if "step" in rows else rows
