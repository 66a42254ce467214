"""Run folders as training leaves them, made without training."""

import math
import random

import yaml

from opd.tracking.jsonl import JsonlTracker


def make_run(folder, *, steps=120, stop=None, optim="adamw", lr=1e-3, top=0.9, seed=0, task="sums"):
    """A run that learns towards ``top``; ``stop`` ends it early, as a crash would."""
    noise = random.Random(f"{optim}{lr}{seed}")
    config = {
        "run": {"dir": str(folder)},
        "seed": seed,
        "student": {"model": "student-small", "dtype": "float32"},
        "optim": {"lr": lr, "betas": [0.9, 0.95]} if optim == "adamw" else {"lr": lr},
        "train": {"steps": steps, "prompts_per_step": 64},
    }
    about = {
        "config": config,
        "choices": {"optim": optim, "loss": "reverse_kl"},
        "command": f"opd train quickstart optim={optim} optim.lr={lr}",
        "git": "0123abc",
        "versions": {"opd": "0.1.0", "torch": "2.13.0"},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
    tracker = JsonlTracker(folder)
    last = steps if stop is None else stop
    for step in range(last + 1):
        done = 1 - math.exp(-3 * step / steps)
        metrics = {} if step == 0 else _training(step, done, lr, noise)
        if step % 20 == 0 or step == steps:
            metrics |= _evaluation(task, done, top, step)
            tracker.log_samples(step, _samples(task, done))
        tracker.log(step, metrics)
    tracker.close()
    if stop is None:
        (folder / "final").mkdir()
    return folder


def _training(step, done, lr, noise):
    loss = (0.8 - 0.7 * done) * noise.uniform(0.85, 1.15)
    return {
        "loss/total": loss,
        "loss/reverse_kl": loss,
        "teacher/nll": loss + 0.3,
        "student/entropy": 0.4 + 0.1 * noise.random(),
        "rollout/length": 20 + noise.random(),
        "rollout/truncated": 0.05 * (1 - done),
        "optim/grad_norm": loss * noise.uniform(0.5, 2),
        "optim/lr": lr * min(1, step / 10),
        "engine/logp_gap": 1e-5 * noise.uniform(0.9, 1.1),
        "engine/logp_gap_max": 1e-3 * noise.uniform(0.9, 1.1),
        "sync/bytes": 1.6e6,
        "ratio/clipped": 0.01 * noise.random(),
        "time/rollout": noise.uniform(0.3, 0.4),
        "time/teacher": 0.12,
        "time/learn": noise.uniform(0.4, 0.5),
        "time/sync": 0.02,
        "time/step": 1.0,
        "tokens/generated": 1280.0,
        "tokens/trained": 1270.0,
    }


def _evaluation(task, done, top, step):
    metrics = {
        f"eval/{task}/accuracy": 0.25 + (top - 0.25) * done,
        f"eval/{task}/mean_at_k": 0.2 + (top - 0.25) * done,
        f"eval/{task}/reverse_kl": 0.85 - 0.8 * done * top,
        f"eval/{task}/length": 20.0,
        "time/eval": 2.0,
    }
    return metrics if step else metrics | {f"eval/{task}/teacher_accuracy": 0.98}


def _samples(task, done):
    tokens = [*"5+8+0=13;4+7+1=12;3+0+1=4#423", ""]
    gap = [-2.5 * (1 - done) * (i % 5 == 3) + 0.3 * (i % 4 == 1) for i in range(len(tokens))]
    sample = {"task": task, "uid": "0", "prompt": "345+78=", "completion": "".join(tokens)}
    sample |= {"answer": "423", "correct": done > 0.4, "tokens": tokens, "gap": gap}
    return [sample, sample | {"uid": "1", "prompt": "<b>12+30=</b>", "correct": False}]
