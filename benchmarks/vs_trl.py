"""opd beside TRL's DistillationTrainer: the same models, prompts, learning rates and steps.

    python -m venv trl_env
    trl_env/bin/pip install torch==2.13.0        # on a machine without a GPU: the CPU build
    trl_env/bin/pip install trl==1.16.0 'transformers>=5.16.1,<5.20'
    python benchmarks/vs_trl.py --trl-python trl_env/bin/python

1. Step 0: both sides' training loss, and its gradient, on one set of completions that were written
   beforehand, for JSD beta 0, 0.5 and 1. Stops with an error when a loss differs by more than 1e-3.
2. Learning curves: reverse KL on the student's own samples, one process a side, the sides by turns.
   Both see the same prompts in the same steps at the same learning rates; each draws its own samples.
   The students of all sides are then evaluated by one routine: greedy accuracy on the held-out
   prompts and exact reverse KL on samples of them.
3. Seconds a step (from its prompts to the updated weights, saving left out) and peak memory.

TRL runs under --trl-python (see trl_side.py), in an environment of its own. Finished runs in --runs
are taken as they are, so a measurement that was cut goes on. The page, the picture and one JSON line
a measurement go to docs/log/vs_trl.*.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from vs_trl_page import BETAS, MOST, SIDES, THEIRS, VLLM, draw, losses_table, page
from watching import watched

from opd.assembly.training import build_training
from opd.config.optim import AdamWConfig, clipped_warmup
from opd.config.rollout import training_sampling
from opd.config.schema import Config
from opd.run.recipe import Recipe, load_recipe
from opd.train.checkpoints import checkpoints
from opd.train.optimizers import LearningRate
from opd.types import Prompt, Rollout

LOG = Path(__file__).parent.parent / "docs" / "log"
KL_PROMPTS = 256
COMMON = (
    "teacher=local",
    "launch.engine=torch",
    "launch.processes=1",
    "eval.teacher_accuracy=false",
    "sync.verify_every=0",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line sets."""

    trl_python: str
    steps: int
    seeds: list[int]
    sides: list[str]
    save_every: int
    threads: int
    runs: Path


def compose_quickstart(overrides: Iterable[str]) -> Recipe:
    """The quickstart with ``overrides``, in one process of plain torch, generating with transformers."""
    return load_recipe("quickstart", *COMMON, "rollout=transformers", *overrides)


class Bench:
    """Our side's parts in this process: prompts, teacher, engine, learner."""

    def __init__(self, overrides: Sequence[str]) -> None:
        recipe = compose_quickstart(overrides)
        self.config = recipe.config
        with tempfile.TemporaryDirectory() as folder:
            self.training = build_training(
                self.config, Path(folder), recipe.plain, io.StringIO(), None
            )
        self.learner, self.model = self.training.learner, self.training.model
        self.engine, self.teacher = self.training.writer.engine, self.training.teachers.training

    def order(self, steps: int) -> list[Prompt]:
        """The training prompts of all steps, in the order in which a run takes them."""
        stream = self.training.writer.prompts
        return [prompt for step in range(steps) for prompt in stream.take(step)]

    def evaluate(self, weights: dict[str, torch.Tensor]) -> dict[str, float]:
        """Accuracy and reverse KL of a student with these weights."""
        absent, surplus = self.model.load_state_dict(weights, strict=False)
        assert not surplus, surplus
        assert set(absent) <= {"lm_head.weight"}, absent  # tied to the embedding
        loop = self.training.loop
        loop.sync.push(self.learner.weights(), 0)
        assert loop.evaluator is not None
        found = loop.evaluator.evaluate(1).metrics
        task = f"eval/{self.config.eval.task}"
        return {name: found[f"{task}/{name}"] for name in ("accuracy", "reverse_kl")}


def trl_task(config: Config, folder: Path, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What both tasks of trl_side.py need to know."""
    optim = config.optim
    assert isinstance(optim, AdamWConfig)
    assert optim.weight_decay == 0.0, "TRL would decay vectors too"
    steps = config.train.steps
    learning_rate = LearningRate(optim, steps=steps, warmup_steps=clipped_warmup(config))
    return {
        "folder": str(folder),
        "out": str(folder / "out.jsonl"),
        "student": config.student.model,
        "teacher": config.teacher.model,
        "prompts": [prompt.text for prompt in prompts],
        "prompts_per_step": config.train.prompts_per_step,
        "temperature": config.rollout.temperature,
        "max_tokens": config.rollout.max_tokens,
        "seed": config.seed,
        "optim": {
            "lr": optim.lr,
            "betas": list(optim.betas),
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
            "max_grad_norm": optim.max_grad_norm,
            "lrs": [learning_rate(step) for step in range(steps)],
        },
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# Step 0


def our_gradients(beta: float, rollouts: list[Rollout]) -> dict[str, Any]:
    """The loss per token and the gradient of the first training step on these rollouts."""
    bench = Bench(["loss=jsd", f"loss.beta={beta}"])
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in bench.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: gradients.update({name: p.grad.clone()})
        )
    report = bench.learner.step(bench.teacher.score(rollouts))
    return {
        "loss": report.metrics["loss/total"],
        "tokens": report.metrics["tokens/trained"],
        "gradients": gradients,
    }


def step_zero(settings: Settings) -> list[dict[str, Any]]:
    """One row a beta: both losses and how far the gradients are apart."""
    folder = settings.runs / "step_zero"
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench([])
    prompts = bench.order(1)
    rollouts = bench.engine.generate(prompts, training_sampling(bench.config))
    task = trl_task(bench.config, folder, prompts) | {
        "task": "losses",
        "betas": list(BETAS),
        "prompt_ids": [r.prompt.token_ids.tolist() for r in rollouts],
        "completion_ids": [r.token_ids.tolist() for r in rollouts],
    }
    Path(task["out"]).unlink(missing_ok=True)
    (folder / "task.json").write_text(json.dumps(task))
    side = str(Path(__file__).with_name("trl_side.py"))
    command = [settings.trl_python, side, str(folder / "task.json")]
    watched(command, folder / "log.txt", threads=settings.threads)
    versions, *theirs = read_lines(Path(task["out"]))
    rows = []
    for row in theirs:
        ours = our_gradients(row["beta"], rollouts)
        assert ours["tokens"] == row["tokens"]
        their_gradients = load_file(folder / f"gradient_{row['beta']}.safetensors")
        assert ours["gradients"].keys() == their_gradients.keys()
        norm = _norm(their_gradients.values())
        gap = _norm(ours["gradients"][name] - g for name, g in their_gradients.items())
        rows.append(
            {
                "beta": row["beta"],
                "tokens": row["tokens"],
                "opd": ours["loss"],
                "trl": row["loss"],
                "trl_gkd": row["gkd_loss"],
                "grad_norm": norm,
                "grad_gap": gap / norm,
                "versions": versions,
            }
        )
    return rows


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


# Learning curves


def run_ours(settings: Settings, rollout: str, seed: int, folder: Path) -> dict[str, Any]:
    """``opd train``; its steps, its memory, and where its students are."""
    command = [sys.executable, "-m", "opd.cli.main", "train", "quickstart", *COMMON]
    command += [f"rollout={rollout}", f"seed={seed}", f"train.steps={settings.steps}"]
    command += [f"launch.threads={settings.threads}", "data.eval=null"]
    command += [f"save.every={settings.save_every}", "save.keep=1000", f"run.dir='{folder}/run'"]
    steps = folder / "run" / "metrics.jsonl"
    figures = watched(command, folder / "log.txt", threads=settings.threads, steps=steps)
    rows = read_lines(steps)[1:]
    return figures | {
        "seconds": [round(row["time/step"], 4) for row in rows],
        "length": [row["rollout/length"] for row in rows],
    }


def our_students(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Weights by step."""
    students = {}
    for found in checkpoints(folder / "run"):
        state = torch.load(found / "torch.pt", weights_only=True)["student"]
        weights = {name.removeprefix("model."): weight for name, weight in state.items()}
        students[int(found.name.removeprefix("step_"))] = weights
    return students


def run_trl(settings: Settings, seed: int, folder: Path) -> dict[str, Any]:
    """TRL's trainer; its steps and its memory."""
    bench = Bench([f"seed={seed}", f"train.steps={settings.steps}"])
    prompts = bench.order(settings.steps)
    for prompt in prompts:
        assert (
            bench.training.tokenizer.tokenizer(prompt.text)["input_ids"]
            == prompt.token_ids.tolist()
        )
    task = trl_task(bench.config, folder, prompts) | {
        "task": "train",
        "beta": 1.0,
        "steps": settings.steps,
        "save_every": settings.save_every,
    }
    Path(task["out"]).unlink(missing_ok=True)
    (folder / "task.json").write_text(json.dumps(task))
    side = str(Path(__file__).with_name("trl_side.py"))
    command = [settings.trl_python, side, str(folder / "task.json")]
    figures = watched(
        command, folder / "log.txt", threads=settings.threads, steps=Path(task["out"])
    )
    _, *rows = read_lines(Path(task["out"]))
    assert len(rows) == settings.steps
    return figures | {
        "seconds": [round(row["seconds"], 4) for row in rows],
        "length": [row["length"] for row in rows],
    }


def trl_students(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Weights by step."""
    return {
        int(found.name.removeprefix("step_")): load_file(found / "model.safetensors")
        for found in sorted(folder.glob("step_*"))
    }


def curves(settings: Settings) -> list[dict[str, Any]]:
    """One row a run: the seconds of its steps, its memory, and its students' evaluations."""
    folders = {
        (side, seed): settings.runs / f"{side.replace(', ', '_').replace(' ', '_')}_{seed}"
        for seed in settings.seeds
        for side in settings.sides
    }
    for (side, seed), folder in folders.items():
        done = folder / "run.json"
        if done.exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if side == THEIRS:
            figures = run_trl(settings, seed, folder)
        else:
            figures = run_ours(settings, "vllm" if side == VLLM else "transformers", seed, folder)
        done.write_text(json.dumps({"side": side, "seed": seed} | figures))
        median = statistics.median(figures["seconds"])
        print(f"{side}, seed {seed}: median {median:.3f} s a step", flush=True)
    torch.set_num_threads(settings.threads)
    bench = Bench([f"eval.kl_prompts={KL_PROMPTS}"])
    base = bench.evaluate(load_file(f"{bench.config.student.model}/model.safetensors"))
    rows = []
    for (side, seed), folder in folders.items():
        row = json.loads((folder / "run.json").read_text())
        if "evaluations" not in row:
            students = (trl_students if side == THEIRS else our_students)(folder)
            evaluations = [
                {"step": step} | bench.evaluate(weights)
                for step, weights in students.items()
                if step <= 10 or step % 10 == 0
            ]
            row["evaluations"] = [{"step": 0, **base}, *evaluations]
            (folder / "run.json").write_text(json.dumps(row))
            print(f"{side}, seed {seed}: {row['evaluations'][-1]}", flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trl-python", required=True, help="interpreter that has TRL; see above")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 to 4"
    )
    parser.add_argument("--without-vllm", action="store_true", help="no third side: opd with vLLM")
    parser.add_argument("--save-every", type=int, default=2, help="steps between kept students")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--runs", type=Path, default=Path("runs/vs_trl"), help="where runs go")
    parser.add_argument("--only-step-0", action="store_true", help="compare losses, write nothing")
    arguments = parser.parse_args()
    settings = Settings(
        trl_python=arguments.trl_python,
        steps=arguments.steps,
        seeds=arguments.seeds,
        sides=[side for side in SIDES if not (side == VLLM and arguments.without_vllm)],
        save_every=arguments.save_every,
        threads=arguments.threads,
        runs=arguments.runs.resolve(),
    )
    losses = step_zero(settings)
    print(losses_table(losses), flush=True)
    for row in losses:
        gap = abs(row["opd"] - row["trl"])
        assert gap <= MOST, f"beta {row['beta']}: the losses differ by {gap:.1e}, {MOST:g} allowed"
    if arguments.only_step_0:
        return
    runs = curves(settings)
    command = (
        f"python benchmarks/vs_trl.py --trl-python TRL_ENV/bin/python --steps {settings.steps} "
        f"--seeds {' '.join(map(str, settings.seeds))} --threads {settings.threads}"
    )
    LOG.mkdir(exist_ok=True)
    draw(runs, LOG / "vs_trl.png")
    (LOG / "vs_trl.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*losses, *runs]))
    config = compose_quickstart([f"train.steps={settings.steps}"]).config
    text = page(config, losses, runs, command=command, threads=settings.threads, prompts=KL_PROMPTS)
    (LOG / "vs_trl.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
