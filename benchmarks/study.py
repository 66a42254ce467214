"""Run a recipe under several settings and seeds and keep the results; an interrupted study is resumed.

    python benchmarks/study.py quickstart --name quickstart_matrix --seeds 0 \
        --settings loss=reverse_kl loss=jsd optim=sgd "optim=sgd zero=3"

Each run is the ordinary command ``opd train``. One JSON line per run goes to docs/log/NAME.jsonl as it
ends, and docs/log/NAME.md is rewritten from all lines.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LOG = Path(__file__).parent.parent / "docs" / "log"


def run(recipe: str, setting: str, seed: int, runs: Path, fixed: Sequence[str]) -> dict[str, Any]:
    """One run; its first and last evaluation, seconds in all and in steps."""
    folder = runs / f"{setting.replace(' ', ',').replace('/', '_')},seed={seed}"
    quoted = f"run.dir='{folder}'"
    started = time.time()
    command = ["train", recipe, *setting.split(), *fixed, f"seed={seed}", quoted]
    subprocess.run([sys.executable, "-m", "opd.cli.main", *command], check=True)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [
        {"step": row["step"]} | {k: v for k, v in row.items() if k.startswith("eval/")}
        for row in rows
        if any(k.startswith("eval/") for k in row)
    ]
    return {
        "setting": setting,
        "seed": seed,
        "evaluations": evaluations,
        "seconds": round(time.time() - started, 1),
        "seconds_in_steps": round(sum(row.get("time/step", 0.0) for row in rows), 1),
    }


def page(name: str, command: str, lines: list[dict[str, Any]]) -> str:
    """A Markdown table: one row a run, one column a metric, before and after."""
    metrics = sorted(
        {
            k
            for line in lines
            for e in line["evaluations"]
            for k in e
            if k.endswith(("/accuracy", "/reverse_kl"))
        }
    )
    head = ["setting", "seed", "steps", *metrics, "seconds in steps", "seconds in all"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for line in lines:
        first, last = line["evaluations"][0], line["evaluations"][-1]
        cells = [f"{first[m]:.3f} → {last[m]:.3f}" if m in last else "" for m in metrics]
        start = [line["setting"], line["seed"], last["step"]]
        end = [line["seconds_in_steps"], line["seconds"]]
        table.append("| " + " | ".join(map(str, [*start, *cells, *end])) + " |")
    date = time.strftime("%Y-%m-%d")
    machine = f"{os.cpu_count()} CPU cores, no GPU"
    return f"# {name}\n\n{date}, {machine}.\n\n    {command}\n\n" + "\n".join(table) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--name", required=True, help="docs/log/NAME.jsonl and .md")
    parser.add_argument("--settings", nargs="+", required=True, help="each a set of overrides")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--fixed", nargs="*", default=[], help="overrides of every run")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run folders go")
    arguments = parser.parse_args()
    record = LOG / f"{arguments.name}.jsonl"
    LOG.mkdir(exist_ok=True)
    lines = [json.loads(x) for x in record.read_text().splitlines()] if record.exists() else []
    done = {(line["setting"], line["seed"]) for line in lines}
    words = " ".join(f'"{a}"' if " " in a else a for a in sys.argv[1:])
    for setting in arguments.settings:
        for seed in arguments.seeds:
            if (setting, seed) in done:
                continue
            line = run(
                arguments.recipe, setting, seed, arguments.runs / arguments.name, arguments.fixed
            )
            lines.append(line)
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")
            command = f"python benchmarks/study.py {words}"
            (LOG / f"{arguments.name}.md").write_text(page(arguments.name, command, lines))


if __name__ == "__main__":
    main()
