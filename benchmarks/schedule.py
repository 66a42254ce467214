"""schedule=one_step_off beside schedule=sync, with engine and teacher on one core and the learner on another.

    python benchmarks/schedule.py [--steps 60] [--seeds 0 1 2] [--out FOLDER]

Starts `opd rollout` and `opd teacher` for the quickstart, pinned to core 0, and runs the two schedules by
turns with one rank pinned to core 1. Prints seconds a step without the first ones, the share of the
teacher's time that is hidden, and the final accuracy. Needs Linux (taskset) and two cores.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart"
SKIPPED = 5
SCHEDULES = {
    "sync": ["schedule=sync"],
    "one_step_off": ["schedule=one_step_off"],
}
SERVER_SECONDS = 600


def opd(core: int, *arguments: str) -> list[str]:
    """A command of opd on one core."""
    return ["taskset", "-c", str(core), sys.executable, "-m", "opd.cli.main", *arguments]


@contextmanager
def server(kind: str, *settings: str) -> Iterator[str]:
    """The address of a running server."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with log.open("w") as file:
            command = opd(0, kind, *settings, "port=0")
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            yield address(process, log)
        finally:
            process.terminate()
            process.wait()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """The address that a server prints when it is ready."""
    end = time.monotonic() + SERVER_SECONDS
    while time.monotonic() < end and process.poll() is None:
        found = re.search(r"http://[\w.]+:\d+", log.read_text())
        if found:
            return found.group()
        time.sleep(0.5)
    raise RuntimeError(f"a server did not start:\n{log.read_text()[-3000:]}")


def train(folder: Path, urls: dict[str, str], schedule: str, seed: int, steps: int) -> None:
    """One run; its output goes to a file beside it."""
    command = opd(
        1,
        "train",
        "quickstart",
        f"run.dir={folder}",
        f"seed={seed}",
        f"train.steps={steps}",
        "launch.processes=1",
        "rollout=server",
        f"rollout.urls=[{urls['rollout']}]",
        "teacher=server",
        f"teacher.url={urls['teacher']}",
        "loss.correction=truncate",
        *SCHEDULES[schedule],
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])


def figures(folder: Path) -> dict[str, float]:
    """Medians over the steps after the first ones, and the final accuracy."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [row for row in rows if "time/step" in row][SKIPPED:]
    names = ["step", "rollout", "teacher", "learn", "sync", "wait"]
    found = {
        name: statistics.median(row.get(f"time/{name}", 0.0) for row in steps) for name in names
    }
    accuracies = [v for k, v in rows[-1].items() if re.fullmatch(r"eval/.*/accuracy", k)]
    return found | {"accuracy": accuracies[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in SCHEDULES}
    with ExitStack() as stack:
        out = arguments.out or Path(stack.enter_context(TemporaryDirectory()))
        urls = {
            "rollout": stack.enter_context(
                server("rollout", f"model={RECIPE / 'student'}", "dtype=float32")
            ),
            "teacher": stack.enter_context(server("teacher", f"model={RECIPE / 'teacher'}")),
        }
        for seed in arguments.seeds:
            for schedule in SCHEDULES:
                folder = out / f"{schedule}_{seed}"
                train(folder, urls, schedule, seed, arguments.steps)
                found[schedule].append(figures(folder))
                print(schedule, seed, json.dumps(found[schedule][-1]), flush=True)
    medians = {
        schedule: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for schedule, rows in found.items()
    }
    sync, ahead = medians["sync"], medians["one_step_off"]
    # the learner waits for the teacher where writing alone would have ended before learning did
    visible = max(0.0, ahead["wait"] - max(0.0, ahead["rollout"] - ahead["learn"]))
    hidden = max(0.0, 1 - visible / ahead["teacher"])
    for schedule, row in medians.items():
        print(schedule, {key: round(value, 4) for key, value in row.items()})
    print(f"sync / one_step_off: {sync['step'] / ahead['step']:.2f}")
    print(f"share of the teacher's time that is hidden: {hidden:.0%}")


if __name__ == "__main__":
    main()
