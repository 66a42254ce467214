"""Writes the model of a run, or of one of its checkpoints, as a folder for a model hub."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from opd.assembly.stored_model import export_checkpoint
from opd.checkpoint.companions import require_free
from opd.run.model_names import CONFIG, resolved_model
from opd.run.recipe import find_recipe, load_recipe
from opd.tracking.runs import RunRecord, read_run
from opd.train.checkpoints import MANIFEST, read_manifest

CARD = "README.md"


def is_checkpoint(model: str) -> bool:
    """Whether ``model`` is a checkpoint in a run folder, such as runs/x/checkpoints/step_000040."""
    return (Path(model) / MANIFEST).is_file()


def write_model(model: str, out: Path) -> Path:
    """Write the final model of the run ``model``, or the model of a checkpoint, and a card; returns ``out``.

    Raises ValueError for a folder that is neither, and when ``out`` exists.
    """
    require_free(out)
    if is_checkpoint(model):
        checkpoint = Path(model).resolve()
        run_folder, step = checkpoint.parent.parent, read_manifest(checkpoint).step
        record = read_run(run_folder)
        recipe = load_recipe(find_recipe(str(run_folder / CONFIG)))
        export_checkpoint(recipe.config, run_folder, checkpoint, out)
    else:
        record = read_run(Path(model))
        step = record.step
        shutil.copytree(resolved_model(model), out)
    (out / CARD).write_text(model_card(record, step), encoding="utf-8")
    return out


def model_card(run: RunRecord, step: int) -> str:
    """A hub's README.md: what the model was trained from, how, and its figures at ``step``."""
    config = run.config
    student, teacher = config["student"]["model"], config.get("teacher", {}).get("model")
    head = {"library_name": "transformers", "tags": ["on-policy-distillation", "opd"]}
    if not Path(student).is_absolute():
        head["base_model"] = student
    loss = run.choices.get("loss", "")
    taught = f", taught by `{teacher}`" if teacher else ""
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {run.name}",
        "",
        f"`{student}`{taught}, after {step} steps of on-policy distillation (`loss={loss}`).",
        "",
        *_data(config),
        *_figures(run, step),
        "## How it was trained",
        "",
        "```",
        str(run.about.get("command") or ""),
        "```",
        "",
        "Settings:",
        "",
        "```yaml",
        yaml.safe_dump(dict(config), sort_keys=False).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _data(config: Mapping[str, Any]) -> Iterator[str]:
    data = config.get("data", {})
    for name, what in (("train", "Training prompts"), ("eval", "Held-out prompts")):
        if data.get(name):
            yield from (f"{what}: `{data[name]}`", "")


def _figures(run: RunRecord, step: int) -> Iterator[str]:
    """A table of the evaluations up to ``step``: before training, and the last one."""
    rows = [row for row in run.rows if row["step"] <= step]
    names = sorted({key for row in rows for key in row if key.startswith("eval/")})
    if not names:
        return
    yield from ("## Evaluation", "", "| metric | before | after | at step |", "|---|---|---|---|")
    for name in names:
        points = [(row[name], row["step"]) for row in rows if name in row]
        (first, start), (last, at) = points[0], points[-1]
        before = f"{first:.4f}" if start == 0 else "-"
        yield f"| {name} | {before} | {last:.4f} | {at} |"
    yield ""
