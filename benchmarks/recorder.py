"""What record=weights costs: a run that records every second step, recorded steps beside the others.

Both figures come out of one run, so that a busy machine slows them alike. "measured" is the time that
the recorder itself reports, waiting for other ranks included; "by turns" is how much longer the learner took
in recorded steps than in the ones between them (medians). The share is of a whole step, for a recording
every tenth step.

    python benchmarks/recorder.py [--steps 40] [--out recorder.json] [KEY=VALUE ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

EVERY = 10
PLAIN = (
    "record=weights",
    "record.every=2",
    "eval.every=0",
    "eval.kl_prompts=0",
    "eval.teacher_accuracy=false",
    "data.eval_limit=8",
    "save.every=0",
    "sync.verify_every=0",
)


def main() -> None:
    """Run the recipe once and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="quickstart", help="what is trained")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps (default: 40)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "opd.cli.main", "train", arguments.recipe, *PLAIN]
        command += [f"train.steps={arguments.steps}", f"run.dir={folder}/run", *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    found = figures([json.loads(line) for line in lines])
    for name, value in found.items():
        print(f"{name:34} {value:.4g}")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def figures(rows: list[dict[str, float]]) -> dict[str, float]:
    """Seconds and shares; the first steps, in which caches fill, are left out."""
    rows = [row for row in rows if row["step"] > 4]
    recorded = [row for row in rows if "time/record" in row]
    others = [row for row in rows if "time/record" not in row]
    step = statistics.median(row["time/step"] for row in others)
    measured = statistics.median(row["time/record"] for row in recorded)
    learn = [statistics.median(r["time/learn"] for r in part) for part in (recorded, others)]
    return {
        "steps recorded": len(recorded),
        "steps between": len(others),
        "seconds of a step": step,
        "seconds of a recording, measured": measured,
        "seconds of a recording, by turns": learn[0] - learn[1],
        f"share at every {EVERY}, measured": measured / (EVERY * step),
        f"share at every {EVERY}, by turns": (learn[0] - learn[1]) / (EVERY * step),
    }


if __name__ == "__main__":
    main()
