"""``opd eval``: ask a checkpoint the recipe's held-out questions, without training anything."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from opd import build
from opd.run.recipe import Composed
from opd.config.schema import Config
from opd.config.models import DType
from opd.config.rules import problems
from opd.types import Evaluation


def examine(config: Config, model: str) -> Evaluation:
    """Greedy accuracy and mean@k of ``model`` on data.eval, by the recipe's rollout engine.

    Raises ValueError for the user's mistakes.
    """
    from opd.world import join_world

    if config.data.eval is None:
        raise ValueError("data.eval is not set: there is nothing to ask")
    world = join_world()
    _, progress = build.build_console(world, sys.stdout)
    text = build.build_text(model, trust_remote_code=config.student.trust_remote_code)
    prompts = build.build_prompts(config, text)
    config = replace(config, rollout=build.in_process(config.rollout))
    engine, _ = build.build_engine(config, model, text, prompts.max_length, world, progress)
    evaluator = build.build_evaluator(config, prompts, text, engine, world)
    assert evaluator is not None
    return evaluator.evaluate(1)


def run_eval(composed: Composed, *, model: str | None, out: str | None) -> None:
    """Examine ``model`` (by default the recipe's student) and print a table; ``out`` gets JSON."""
    config = composed.config
    found = problems(config)
    if found:
        raise ValueError("\n".join(found))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chosen = model or config.student.model
    evaluation = examine(config, chosen)
    table = Table("metric", "value", title=chosen)
    for name, value in evaluation.metrics.items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    if out is not None:
        told = {"model": chosen, "metrics": evaluation.metrics, "samples": evaluation.samples}
        Path(out).write_text(json.dumps(told, indent=1, ensure_ascii=False))


def teacher_accuracy(composed: Composed, logs: Path) -> float | None:
    """The teacher's greedy accuracy, by ``opd eval`` in a process of its own, which frees its GPU.

    None, with the reason in logs/teacher_eval.log, when the engine cannot run this teacher.
    """
    config = composed.config
    teacher = config.teacher.model
    if not (config.eval.teacher_accuracy and config.data.eval and teacher):
        return None
    overrides = ["eval.k=0"]
    if config.teacher.dtype != DType.auto:
        overrides.append(f"rollout.dtype={config.teacher.dtype.value}")
    kept = [o for o in composed.overrides if not o.startswith("rollout.dtype=")]
    asked = replace(composed, overrides=kept)
    metrics = examined_apart(asked, teacher, overrides, logs / "teacher_eval.log")
    return None if metrics is None else metrics[f"eval/{config.eval.task}/accuracy"]


def examined_apart(
    composed: Composed, model: str, overrides: list[str], log: Path
) -> dict[str, float] | None:
    """The metrics of ``opd eval`` on a model, in a process of its own; None when it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as file:
        out = Path(folder) / "evaluation.json"
        command = [sys.executable, "-m", "opd.cli.main", "eval", str(composed.recipe)]
        done = subprocess.run(
            [*command, f"--model={model}", f"--out={out}", *composed.overrides, *overrides],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return json.loads(out.read_text())["metrics"] if done.returncode == 0 else None
