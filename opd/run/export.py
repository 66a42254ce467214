"""A run, or a checkpoint of one, becomes a plain Hugging Face folder with a model card."""

import shutil
from pathlib import Path

from opd.assembly.export import export_checkpoint
from opd.checkpoint.companions import require_free
from opd.run.model_card import model_card
from opd.run.model_names import is_checkpoint, recipe_of, resolved_model, run_of
from opd.train.checkpoints import read_manifest

CARD = "README.md"


def export(model: str, out: str | Path) -> int:
    """Write the model of a run folder, or of one of its checkpoints, and its card; returns the step.

    The folder loads in transformers and vLLM, and is laid out as hubs expect. Raises ValueError when
    ``model`` is neither, and when ``out`` exists and is not empty.
    """
    target = Path(out)
    require_free(target)
    run = run_of(model)
    if run is None:
        raise ValueError(f"model={model}: found neither a run folder nor a checkpoint of a run")
    recipe = recipe_of(model)
    if is_checkpoint(Path(model)):
        checkpoint = Path(model).resolve()  # best is a link
        step = read_manifest(checkpoint).step
        export_checkpoint(recipe.config, run, checkpoint, target)
    else:
        step = recipe.config.train.steps
        shutil.copytree(resolved_model(str(run)), target, dirs_exist_ok=True)
    (target / CARD).write_text(model_card(recipe, run, step), encoding="utf-8")
    return step
