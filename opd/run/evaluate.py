"""Evaluates a checkpoint on the held-out prompts of a recipe, without training."""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from opd.assembly.evaluate import build_evaluator
from opd.assembly.rollout import in_process
from opd.config.schema import Config, problems
from opd.run.engine import load_engine
from opd.run.export import is_checkpoint, write_model
from opd.run.model_names import resolved_model
from opd.run.recipe import Recipe, load_recipe
from opd.run.revisions import pinned, pinned_model
from opd.types import Evaluation


def evaluate(recipe: Recipe | str | Path, *overrides: str, model: str | None = None) -> Evaluation:
    """Greedy accuracy and mean@k of ``model`` on data.eval, by the recipe's rollout engine.

    ``model``: folder, run folder, a checkpoint of a run, or hub id; by default the recipe's student.
    The engine runs in this process. Raises ValueError for configuration errors.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, *overrides)
    config = pinned(recipe).config
    found = problems(config)
    if config.data.eval is None:
        found.append("data.eval is not set: there is nothing to evaluate on")
    if found:
        raise ValueError("\n".join(found))
    config = replace(config, rollout=in_process(config.rollout))
    if model is not None and is_checkpoint(model):
        with TemporaryDirectory(prefix="opd-eval-") as folder:
            return _evaluated(config, str(write_model(model, Path(folder) / "model")))
    return _evaluated(
        config, config.student.model if model is None else pinned_model(resolved_model(model))
    )


def _evaluated(config: Config, name: str) -> Evaluation:
    loaded = load_engine(config, name)
    evaluator = build_evaluator(
        config, loaded.prompts, loaded.tokenizer, loaded.engine, loaded.world
    )
    assert evaluator is not None
    return evaluator.evaluate(1)
