"""Every method on the quickstart task with one budget of tokens: one table over seeds.

    python benchmarks/contrast.py [--seeds 0 1 2] [--out runs/contrast] [--only sft grpo]

Runs `opd train contrast_quickstart` once for each arm and seed; finished runs are not run again.
Writes study.md, study.json and study.png into --out.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from opd.tracking.runs import RunRecord, read_run
from opd.tracking.study_report import Arms, arms_table, study_measures, write_arms

ARMS = {
    "sft": ["method=sft"],
    "offline_forward_kl": ["method=offline"],
    "opd_reverse_kl": ["method=opd", "loss=reverse_kl"],
    "opd_reverse_kl_3e-4": ["method=opd", "loss=reverse_kl", "optim.lr=3e-4"],
    "opd_forward_kl": ["method=opd", "loss=forward_kl"],
    "opd_jsd": ["method=opd", "loss=jsd"],
    "opd_pg": ["method=opd_pg"],
    "half_on_policy": ["method=opd", "loss=reverse_kl", "rollout.on_policy=0.5"],
    "self_distill": [
        "method=self_distill",
        "data.teacher_template='{prompt}{completion}{prompt}'",
        "data.eval_teacher_template='{prompt}'",
    ],
    "grpo": ["method=grpo"],
}
PAIRS = [
    ("opd_reverse_kl", "sft"),
    ("opd_reverse_kl", "offline_forward_kl"),
    ("opd_forward_kl", "offline_forward_kl"),
    ("opd_reverse_kl", "opd_forward_kl"),
    ("opd_reverse_kl_3e-4", "opd_reverse_kl"),
    ("opd_reverse_kl_3e-4", "offline_forward_kl"),
    ("opd_reverse_kl", "opd_jsd"),
    ("opd_reverse_kl", "opd_pg"),
    ("opd_reverse_kl", "half_on_policy"),
    ("opd_reverse_kl", "grpo"),
]


def run_arm(arm: str, seed: int, out: Path) -> Path:
    """The folder of a finished run; what it printed is in log.txt beside it."""
    folder = out / f"{arm}_{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "final").is_dir():
        command = [sys.executable, "-m", "opd.cli.main", "train", "contrast_quickstart"]
        command.append("launch.threads=1")  # the models are tiny
        with (out / f"{arm}_{seed}.txt").open("w") as log:
            subprocess.run(
                [*command, *ARMS[arm], f"seed={seed}", f"run.dir={folder}"],
                check=True,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    return folder


def main() -> None:
    """Run what is missing, then compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/contrast"))
    parser.add_argument("--only", nargs="+", choices=ARMS, default=list(ARMS))
    given = parser.parse_args()
    runs: dict[str, dict[int, RunRecord]] = {arm: {} for arm in given.only}
    for seed in given.seeds:
        for arm in given.only:
            print(f"{arm}, seed {seed}", flush=True)
            runs[arm][seed] = read_run(run_arm(arm, seed, given.out))
    pairs = [(a, b) for a, b in PAIRS if a in runs and b in runs]
    arms = Arms(runs=runs, measures=study_measures("addition"), pairs=pairs)
    write_arms(arms, given.out, "contrast_quickstart: every method, one budget")
    from rich.console import Console

    Console().print(arms_table(arms))


if __name__ == "__main__":
    main()
