"""Whole training steps of opd beside TRL's DistillationTrainer: speed, CPU time and memory of everything.

    python benchmarks/end_to_end.py --trl-python TRL_ENV/bin/python [--case smollm2] [--steps 6] [--rounds 2]

Both sides train the same student on the same prompts with the same exact reverse KL, learning rates and
number of steps, in float32, by turns. The environment of TRL is that of vs_trl.py. Cases:

quickstart  the two-layer pair that comes with opd, 64 prompts a step
smollm2     SmolLM2-135M, damaged, from SmolLM2-135M: 16 prompts x 128 tokens. Make the models first, with
            the two commands in recipes/smollm2_135m_heal.yaml

Prints medians over the steps after the first: trained tokens per second, seconds and CPU seconds a trained
token, the parts of opd's step, and the peak memory of all processes together.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from watching import watched

from opd.config.optim import AdamWConfig, clipped_warmup
from opd.data.prompt_sets import read_prompt_sets
from opd.data.stream import ShuffledPrompts
from opd.data.tokenizer import read_student_tokenizer
from opd.run.recipe import load_recipe
from opd.train.optimizers import LearningRate

COMMON = (
    "loss=reverse_kl",
    "train.precision=fp32",
    "data.eval=null",
    "eval.kl_data=null",
    "eval.teacher_accuracy=false",
    "sync.verify_every=0",
    "save.every=0",
    "launch.processes=1",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A recipe and what is changed of it."""

    recipe: str
    overrides: tuple[str, ...] = ()


CASES = {
    "quickstart": Case(recipe="quickstart"),
    "smollm2": Case(
        recipe="smollm2_135m_heal",
        overrides=("train.prompts_per_step=16", "rollout.max_tokens=128"),
    ),
}


def settings_of(case: Case, steps: int, extra: list[str]) -> list[str]:
    """The overrides of a run of opd."""
    return [*COMMON, *case.overrides, f"train.steps={steps}", *extra]


def trl_task(case: Case, steps: int, folder: Path) -> dict[str, Any]:
    """What trl_side.py needs to train the same."""
    config = load_recipe(case.recipe, *settings_of(case, steps, ["teacher=local"])).config
    tokenizer = read_student_tokenizer(config.student, config.data.chat_template)
    prompts = read_prompt_sets(config, tokenizer)
    stream = ShuffledPrompts(
        prompts.train, config.train.prompts_per_step, config.seed, 0, 1, prompts.groups
    )
    texts = []
    for prompt in (each for step in range(steps) for each in stream.take(step)):
        ids = prompt.token_ids.tolist()
        texts.append(tokenizer.tokenizer.decode(ids))
        again = tokenizer.tokenizer(texts[-1])["input_ids"]
        assert again == ids, "the prompt's text gives other ids"
    optim = config.optim
    assert isinstance(optim, AdamWConfig)
    rate = LearningRate(optim, steps=steps, warmup_steps=clipped_warmup(config))
    return {
        "task": "train",
        "beta": 1.0,
        "steps": steps,
        "save_every": steps + 1,
        "folder": str(folder),
        "out": str(folder / "out.jsonl"),
        "student": str(Path(config.student.model).resolve()),
        "teacher": str(Path(str(config.teacher.model)).resolve()),
        "prompts": texts,
        "prompts_per_step": config.train.prompts_per_step,
        "temperature": config.rollout.temperature,
        "max_tokens": config.rollout.max_tokens,
        "seed": config.seed,
        "optim": {
            "lr": optim.lr,
            "betas": list(optim.betas),
            "eps": optim.eps,
            "weight_decay": 0.0,
            "max_grad_norm": optim.max_grad_norm,
            "lrs": [rate(step) for step in range(steps)],
        },
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_trl(
    case: Case, folder: Path, steps: int, threads: int, interpreter: str
) -> dict[str, float]:
    """TRL's figures."""
    task = trl_task(case, steps, folder)
    Path(task["out"]).unlink(missing_ok=True)
    (folder / "task.json").write_text(json.dumps(task))
    command = [
        interpreter,
        str(Path(__file__).with_name("trl_side.py")),
        str(folder / "task.json"),
    ]
    found = watched(command, folder / "log.txt", threads=threads, steps=Path(task["out"]), warm=1)
    _, *rows = rows_of(Path(task["out"]))
    tokens = [row["length"] * task["prompts_per_step"] for row in rows]
    return summary([row["seconds"] for row in rows], tokens, found)


def run_opd(
    case: Case, folder: Path, steps: int, threads: int, extra: list[str]
) -> dict[str, float]:
    """The figures of opd."""
    settings = [*settings_of(case, steps, extra), f"run.dir={folder}/run"]
    settings.append(f"launch.threads={threads}")
    command = [sys.executable, "-m", "opd.cli.main", "train", case.recipe, *settings]
    metrics = folder / "run" / "metrics.jsonl"
    found = watched(command, folder / "log.txt", threads=threads, steps=metrics, warm=2)
    rows = [row for row in rows_of(metrics) if "time/step" in row]
    tokens = [row["tokens/trained"] for row in rows]
    parts = {
        name: statistics.median(row[f"time/{name}"] for row in rows[1:])
        for name in ("rollout", "teacher", "learn", "sync")
    }
    return summary([row["time/step"] for row in rows], tokens, found) | parts


def summary(seconds: list[float], tokens: list[float], found: dict[str, float]) -> dict[str, float]:
    """Figures of the steps after the first."""
    mean_tokens = statistics.fmean(tokens[1:])
    return {
        "tokens": mean_tokens,
        "seconds": statistics.median(seconds[1:]),
        "tokens_per_second": sum(tokens[1:]) / sum(seconds[1:]),
        "cpu_ms_per_token": 1000 * found.get("cpu_seconds", float("nan")) / mean_tokens,
        "memory_mib": found["together_mib"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", required=True, help="interpreter that has TRL")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/end_to_end"))
    parser.add_argument(
        "--opd", nargs="*", default=["teacher=local"], help="settings of opd's side"
    )
    arguments = parser.parse_args()
    for name in arguments.case:
        found: dict[str, list[dict[str, float]]] = {"opd": [], "TRL": []}
        for number in range(arguments.rounds):
            for side in found:
                folder = arguments.runs.resolve() / f"{name}_{side}_{number}"
                folder.mkdir(parents=True, exist_ok=True)
                if side == "TRL":
                    row = run_trl(
                        CASES[name],
                        folder,
                        arguments.steps,
                        arguments.threads,
                        arguments.trl_python,
                    )
                else:
                    row = run_opd(
                        CASES[name], folder, arguments.steps, arguments.threads, arguments.opd
                    )
                found[side].append(row)
                print(name, side, {k: round(v, 4) for k, v in row.items()}, flush=True)
        medians = {
            side: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
            for side, rows in found.items()
        }
        ours, theirs = medians["opd"], medians["TRL"]
        for key in ("tokens_per_second", "seconds", "cpu_ms_per_token", "memory_mib"):
            print(
                f"{name}: {key} opd {ours[key]:.4g}, TRL {theirs[key]:.4g}, "
                f"opd / TRL {ours[key] / theirs[key]:.2f}"
            )


if __name__ == "__main__":
    main()
