"""``opd eval`` in a separate process, which frees the GPU when it ends."""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from opd.checked_json import read_json
from opd.config.student import DType
from opd.run.environment import child_environment
from opd.run.recipe import Recipe
from opd.run.stages import stage
from opd.serving.parent import parent_variable


def teacher_accuracy(recipe: Recipe, logs: Path) -> float | None:
    """The teacher's greedy accuracy on data.eval.

    None without an evaluation or a teacher model, and, with the reason in logs/teacher_eval.log, when
    the rollout engine cannot run this teacher.
    """
    config = recipe.config
    teacher = config.teacher
    if not (config.eval.teacher_accuracy and config.data.eval and teacher.model):
        return None
    overrides = ["eval.k=0"]
    if teacher.dtype != DType.auto:
        overrides.append(f"rollout.dtype={teacher.dtype.value}")
    others = [o for o in recipe.overrides if not o.startswith("rollout.dtype=")]
    changed = replace(recipe, overrides=others)
    with stage("evaluate the teacher"):
        metrics = evaluate_apart(changed, teacher.model, overrides, logs / "teacher_eval.log")
    return None if metrics is None else metrics[f"eval/{config.eval.task}/accuracy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Evaluation:
    """What is read of the file that ``opd eval`` writes."""

    metrics: dict[str, float]


def _metrics(file: Path) -> dict[str, float]:
    return read_json(file.read_bytes(), _Evaluation, file, "run opd eval again").metrics


def evaluate_apart(
    recipe: Recipe, model: str, overrides: list[str], log: Path
) -> dict[str, float] | None:
    """The metrics of ``opd eval`` on a model; None when it fails, with the reason in ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as file:
        out = Path(folder) / "evaluation.json"
        command = [sys.executable, "-m", "opd.cli.main", "eval", str(recipe.path)]
        done = subprocess.run(
            [*command, f"model={model}", f"out={out}", *recipe.overrides, *overrides],
            env=child_environment() | parent_variable(),
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        return _metrics(out) if done.returncode == 0 else None
