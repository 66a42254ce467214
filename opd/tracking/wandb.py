"""Weights & Biases, online or offline; the only place that imports wandb."""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opd.config.tracking import WandbConfig

RUN_ID = "wandb_run_id.txt"
_SAMPLE_COLUMNS = ("task", "uid", "prompt", "completion", "answer", "correct")


class WandbTracker:
    """A ``Tracker`` that writes to one Weights & Biases run, the same one after a resume.

    The run's id is kept in ``folder``; offline runs are written there too and need no network
    (``wandb sync`` uploads them later). The step is an ordinary metric and the x axis of all others,
    because the step counter of wandb cannot go back to the checkpoint of a resumed run.
    """

    def __init__(
        self,
        config: WandbConfig,
        *,
        name: str,
        folder: str | Path,
        resolved: Mapping[str, Any],
    ) -> None:
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.project,
                name=name,
                dir=str(folder),
                config=dict(resolved),
                mode=config.mode.value,
                id=_run_id(Path(folder)),
                resume="allow",
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ValueError(
                f"wandb refused the run ({error}); log in with `wandb login`, or use "
                "tracking.mode=offline"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One row for one step."""
        self._run.log({"step": step, **metrics})

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """One table of transcripts, without their per-token numbers."""
        import wandb

        table = wandb.Table(columns=list(_SAMPLE_COLUMNS))
        for sample in samples:
            table.add_data(*(sample.get(column) for column in _SAMPLE_COLUMNS))
        self._run.log({"step": step, "samples": table})

    def close(self) -> None:
        """Upload or write what is pending."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    path = folder / RUN_ID
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
