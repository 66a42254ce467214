"""The trackers and the progress display of a run."""

from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

from opd.config.record import WeightRecordConfig
from opd.config.schema import Config
from opd.config.tracking import WandbConfig
from opd.heartbeat import Heartbeat
from opd.interfaces import Progress, Tracker
from opd.tracking.console import (
    ConsoleProgress,
    ConsoleTracker,
    CountedProgress,
    SilentProgress,
)
from opd.tracking.fanout import Trackers
from opd.tracking.jsonl import METRICS, JsonlTracker, WeightRecord, read_lines
from opd.tracking.signs import SignTracker
from opd.tracking.wandb import WandbTracker
from opd.train.record import Write
from opd.world import World


def build_console(
    world: World, terminal: TextIO, heartbeat: Heartbeat | None = None
) -> tuple[Console, Progress]:
    """A rich console and its progress bars; both print nothing on ranks other than 0.

    What advances a bar is progress for ``heartbeat`` too, on every rank.
    """
    console = Console(file=terminal, quiet=not world.is_main, markup=False)
    progress = ConsoleProgress(console) if world.is_main else SilentProgress()
    return console, progress if heartbeat is None else CountedProgress(progress, heartbeat.move)


def build_trackers(
    config: Config,
    folder: Path,
    resolved: dict[str, Any],
    console: Console,
    world: World,
    resumed: int | None,
) -> Tracker:
    """The run's files, the console, and Weights & Biases where configured; no tracker off rank 0.

    ``resumed`` is the step of the checkpoint that the run resumes from.
    """
    if not world.is_main:
        return Trackers()
    files = JsonlTracker(folder, resumed)  # it drops the rows of later steps first
    earlier = read_lines(folder / METRICS)
    trackers: list[Tracker] = [
        files,
        ConsoleTracker(console, config.train.steps, earlier),
        SignTracker(partial(console.print, style="yellow", soft_wrap=True), earlier),
    ]
    if isinstance(config.tracking, WandbConfig):
        trackers.append(
            WandbTracker(config.tracking, name=config.run.name, folder=folder, resolved=resolved)
        )
    return Trackers(trackers)


def build_weight_record(config: Config, folder: Path, world: World, resumed: int | None) -> Write:
    """The function that writes rows of record=weights; it does nothing off rank 0."""
    if not world.is_main or not isinstance(config.record, WeightRecordConfig):
        return lambda step, row: None
    return WeightRecord(folder, resumed).append
