"""What vs_trl.py tells: tables, the picture, and the page of the log."""

import os
import statistics
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.config.optim import AdamWConfig
from opd.config.schema import Config
from opd.tracking.study_report import interval

Rows = list[dict[str, Any]]

MOST = 1e-3
BETAS = {0.0: "forward KL", 0.5: "JSD", 1.0: "reverse KL"}
OURS, THEIRS, VLLM = "opd", "TRL", "opd, vLLM"
SIDES = {
    OURS: "`opd train`, transformers' generate",
    THEIRS: "`DistillationTrainer`, transformers' generate",
    VLLM: "`opd train`, vLLM in the process",
}
_LOOKS = {OURS: ("#1f5fa8", "-"), THEIRS: ("#d1661a", "--"), VLLM: ("#5a9e4b", ":")}


def of_side(runs: Rows, side: str) -> Rows:
    """The runs of one side, by seed."""
    return [run for run in runs if run["side"] == side]


def spread(values: list[float], digits: int) -> str:
    """Median (lowest to highest)."""
    lowest, highest = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if lowest == highest else f"{middle} ({lowest} to {highest})"


def losses_table(losses: Rows) -> str:
    """One row a beta."""
    lines = [
        "| beta | is | opd | TRL | TRL, GKDTrainer | opd - TRL | gradient norm | gradients differ by |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in losses:
        gap = row["opd"] - row["trl"]
        lines.append(
            f"| {row['beta']:g} | {BETAS[row['beta']]} | {row['opd']:.7f} | {row['trl']:.7f} | "
            f"{row['trl_gkd']:.7f} | {gap:+.0e} | {row['grad_norm']:.4f} | {row['grad_gap']:.0e} |"
        )
    return "\n".join(lines)


def curves_table(runs: Rows, metric: str, digits: int) -> str:
    """One row per evaluation, one column per side: median over seeds (lowest to highest)."""
    sides = [side for side in SIDES if of_side(runs, side)]
    lines = ["| step | " + " | ".join(sides) + " |", "|---:|" + "---|" * len(sides)]
    for place, first in enumerate(runs[0]["evaluations"]):
        cells = [
            spread([run["evaluations"][place][metric] for run in of_side(runs, side)], digits)
            for side in sides
        ]
        lines.append(f"| {first['step']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(runs: Rows) -> str:
    """opd minus TRL, paired by seed, in words."""
    last = runs[0]["evaluations"][-1]["step"]
    pairs = list(zip(of_side(runs, OURS), of_side(runs, THEIRS), strict=True))
    figures: dict[str, Callable[[list[float]], float]] = {
        "mean over the evaluations": statistics.mean,
        f"at step {last}": lambda values: values[-1],
    }
    lines = []
    for metric, name in (("accuracy", "accuracy"), ("reverse_kl", "reverse KL")):
        for when, figure in figures.items():
            found = interval(
                [
                    figure([p[metric] for p in ours["evaluations"]])
                    - figure([p[metric] for p in theirs["evaluations"]])
                    for ours, theirs in pairs
                ]
            )
            verdict = "real" if found.excludes_zero else "no difference that these seeds can show"
            lines.append(f"- {name}, {when}: {found.mean:+.4f} ± {found.half:.4f}: {verdict}")
    return "\n".join(lines)


def costs_table(runs: Rows) -> str:
    """One row a side: time and memory, median over seeds (lowest to highest)."""
    lines = [
        "| side | seconds a step: median | fastest tenth | CPU seconds a step | completion, tokens "
        "| peak MiB, training process | all processes |",
        "|---|---|---|---|---:|---|---|",
    ]
    for side, what in SIDES.items():
        own = of_side(runs, side)
        if own:
            cells = [
                spread([statistics.median(run["seconds"]) for run in own], 3),
                spread([statistics.quantiles(run["seconds"], n=10)[0] for run in own], 3),
                spread([run["cpu_seconds"] for run in own], 3),
                f"{statistics.mean(length for run in own for length in run['length']):.1f}",
                spread([run["largest_mib"] for run in own], 0),
                spread([run["together_mib"] for run in own], 0),
            ]
            lines.append(f"| **{side}**: {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cpu_ratios(runs: Rows) -> str:
    """TRL over opd, both with transformers writing."""
    pairs = zip(of_side(runs, THEIRS), of_side(runs, OURS), strict=True)
    return ", ".join(f"{trl['cpu_seconds'] / opd['cpu_seconds']:.2f}" for trl, opd in pairs)


def draw(runs: Rows, path: Path) -> None:
    """Accuracy and reverse KL over steps, a thin line a run and a thick one for the median."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    metrics = (("accuracy", "held-out accuracy"), ("reverse_kl", "reverse KL, nats per token"))
    for panel, (metric, label) in zip(axes, metrics, strict=True):
        for side, (colour, dashes) in _LOOKS.items():
            own = of_side(runs, side)
            if not own:
                continue
            steps = [point["step"] for point in own[0]["evaluations"]]
            values = [[point[metric] for point in run["evaluations"]] for run in own]
            for each in values:
                panel.plot(steps, each, color=colour, linewidth=0.7, alpha=0.4)
            middle = [statistics.median(point) for point in zip(*values, strict=True)]
            panel.plot(steps, middle, dashes, color=colour, linewidth=2, label=side)
        panel.set_xlabel("optimizer step")
        panel.set_ylabel(label)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[0].legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def page(
    config: Config, losses: Rows, runs: Rows, *, command: str, threads: int, prompts: int
) -> str:
    """The page of the log; ``prompts`` held-out prompts were used for both metrics."""
    optim, versions = config.optim, losses[0]["versions"]
    assert isinstance(optim, AdamWConfig)
    betas = " and ".join(f"{beta:g}" for beta in optim.betas)
    seeds = len({run["seed"] for run in runs})
    setting = f"""
        The quickstart's student, teacher and prompts, float32. {config.train.prompts_per_step} prompts a
        step, one completion each, at temperature {config.rollout.temperature:g} and of at most
        {config.rollout.max_tokens} tokens; AdamW, lr {optim.lr:g}, betas {betas}, no decay, clipping at
        {optim.max_grad_norm:g}, {optim.warmup_steps} steps of warm-up and linear decay to
        {optim.min_lr_ratio:g} of the peak. TRL gets the rate of every step and asserts it. No activation
        checkpointing on
        either side (TRL's default is on). TRL generates with transformers.
        """
    machine = f"""
        {time.strftime("%Y-%m-%d")}, {os.cpu_count()} CPU cores, no GPU, other work beside it. TRL
        {versions["trl"]}, `DistillationTrainer`, with transformers {versions["transformers"]} and torch
        {versions["torch"]} in an environment of its own. OMP_NUM_THREADS={threads} for every process.
        """
    return f"""# Beside TRL

{_filled(machine)}

    {command}

{_filled(setting)}

## Step 0, on the same completions

{losses[0]["tokens"]} completion tokens that the student had written; nats per token. opd:
`StudentLearner.step` (collate, Student, chunked loss). TRL: `DistillationTrainer.compute_loss` and
its backward pass; beside it the loss function of the older `trl.experimental.gkd`. "gradients differ
by": norm of the difference over TRL's norm, all parameters.

{losses_table(losses)}

{_DEFINITIONS}
## Learning curves

Reverse KL (TRL: beta 1, its default), {config.train.steps} steps, {seeds} seeds: median (lowest to highest).
Same prompts in the same steps at the same rates; samples are each side's own. All students are
evaluated by one routine: greedy accuracy on {prompts} held-out prompts, exact reverse KL on one sample
of each.

Accuracy:

{curves_table(runs, "accuracy", 3)}

Reverse KL, nats per token:

{curves_table(runs, "reverse_kl", 4)}

![learning curves of opd and TRL](vs_trl.png)

opd minus TRL, paired by seed, mean ± 95 % t-interval:

{differences(runs)}

## Seconds and memory

{_COSTS}
{costs_table(runs)}

CPU seconds of TRL over those of opd, seed by seed: {cpu_ratios(runs)}.
"""


def _filled(text: str) -> str:
    """One paragraph in lines of equal length, whatever numbers are in it."""
    return textwrap.fill(" ".join(text.split()), 100, break_on_hyphens=False)


_DEFINITIONS = f"""\
The benchmark stops when a loss differs by more than {MOST:g}. Nothing had to be converted; the
definitions agree:

- beta: both mix m = beta teacher + (1 - beta) student, and define 0 as forward KL(teacher, student)
  and 1 as reverse KL(student, teacher), where the mixture's own limit would be 0.
- tokens: completion and end tokens count, prompt and padding do not; the state before a token
  predicts it.
- division: the sum over tokens, once, by the number of completion tokens in the whole step. (TRL's
  trainer divides by the local number in evaluation, and `GKDTrainer` when it is given no count.)
- temperature divides the logits of both; neither multiplies the loss by its square.
- layout: TRL pads prompts on the left and completions on the right, opd on the right only. Positions
  within a row differ by a constant, which rotary embeddings see in rounding only.
"""
_COSTS = """\
Wall clock from a step's prompts to its updated weights; CPU seconds of all processes a step, keeping
students included, are what other work on the machine disturbs least: where the seeds of one side lie
far apart in wall clock, that work made the difference. The sides by turns, seed by seed. The models
have 0.4 and 1.2 million parameters, so memory is mostly libraries, and with vLLM its key-value cache
too (512 MiB by default). "all processes" counts shared pages once; for opd it includes the launcher,
which waits beside the training process.
"""
