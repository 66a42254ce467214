"""The model card of a trained student: what it was trained from, on what, how, and its figures."""

from pathlib import Path
from typing import Any

import yaml

from opd.config.sources import source_paths
from opd.run.recipe import Recipe
from opd.tracking.formatting import evaluation_tasks
from opd.tracking.runs import RunRecord, read_run

FIGURES = {
    "accuracy": "accuracy",
    "mean_at_k": "mean@k",
    "pass_at_k": "pass@k",
    "reverse_kl": "reverse KL to the teacher, nats a token",
}
"""Metrics of an evaluation -> their names in the table."""


def model_card(recipe: Recipe, run: Path, step: int) -> str:
    """README.md of the model after ``step`` steps of the run in the folder ``run``."""
    record = read_run(run)
    config = recipe.config
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({} if Path(config.student.model).exists() else {"base_model": config.student.model}),
        "tags": ["on-policy-distillation", "opd"],
    }
    teacher = config.teacher.model
    settings = yaml.safe_dump(recipe.plain, sort_keys=False, allow_unicode=True)
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        f"# {record.name}",
        "",
        f"`{config.student.model}` after {step} of {config.train.steps} steps of on-policy distillation "
        f"(method `{config.method.value}`).",
        "",
        f"- teacher: {f'`{teacher}`' if teacher else recipe.choices['teacher']}",
        f"- loss: {recipe.choices['loss']}; reward: {recipe.choices['reward']}",
        f"- training prompts: {_listed(config.data.train)}",
        f"- held-out prompts: {_listed(config.data.eval)}",
        f"- optimizer: {recipe.choices['optim']}, learning rate {config.optim.lr:g}, "
        f"{config.train.prompts_per_step} prompts a step",
        f"- adapter: {recipe.choices['adapter']}; mask: {recipe.choices['mask']}",
        f"- command: `{record.about['command']}`",
        *([f"- git: {record.about['git']}"] if record.about["git"] else []),
        "",
        *_figures(record, step),
        "## Settings",
        "",
        "```yaml",
        settings.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _listed(source: Any) -> str:
    return ", ".join(f"`{path}`" for path in source_paths(source)) or "none"


def _figures(record: RunRecord, step: int) -> list[str]:
    """A table of the evaluations at step 0 and at the last one up to ``step``; empty without any."""
    rows = [row for row in record.rows if row["step"] <= step and evaluation_tasks(row)]
    if not rows:
        return []
    before, after = rows[0], rows[-1]
    lines = [
        "## Figures",
        "",
        f"| task | figure | step {before['step']} | step {after['step']} | teacher |",
        "|---|---|---|---|---|",
    ]
    for task in evaluation_tasks(after):
        teacher = record.series(f"eval/{task}/teacher_accuracy").last
        for metric, name in FIGURES.items():
            key = f"eval/{task}/{metric}"
            if key in after:
                of_teacher = teacher if metric == "accuracy" else None
                cells = (_cell(before.get(key)), _cell(after[key]), _cell(of_teacher))
                lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
