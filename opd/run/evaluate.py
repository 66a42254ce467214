"""Evaluates a checkpoint on the held-out prompts of a recipe, without training."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from opd.assembly.evaluate import build_evaluator
from opd.assembly.rollout import EngineInputs, build_engine, in_process
from opd.assembly.tracking import build_console
from opd.config.schema import problems
from opd.data.prompt_sets import read_prompt_sets
from opd.data.tokenizer import read_tokenizer
from opd.run.model_names import resolved_model
from opd.run.recipe import Recipe, load_recipe
from opd.types import Evaluation
from opd.world import join_world


def evaluate(recipe: Recipe | str | Path, *overrides: str, model: str | None = None) -> Evaluation:
    """Greedy accuracy and mean@k of ``model`` on data.eval, by the recipe's rollout engine.

    ``model``: folder, run folder or hub id; by default the recipe's student. The engine runs in this
    process. Raises ValueError for configuration errors.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, *overrides)
    config = recipe.config
    found = problems(config)
    if config.data.eval is None:
        found.append("data.eval is not set: there is nothing to evaluate on")
    if found:
        raise ValueError("\n".join(found))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = config.student.model if model is None else resolved_model(model)
    world = join_world()
    _, progress = build_console(world, sys.stdout)
    tokenizer = read_tokenizer(name, trust_remote_code=config.student.trust_remote_code)
    prompts = read_prompt_sets(config, tokenizer)
    config = replace(config, rollout=in_process(config.rollout))
    inputs = EngineInputs(
        config=config,
        model=name,
        tokenizer=tokenizer,
        max_length=prompts.max_length,
        world=world,
        progress=progress,
    )
    engine, _ = build_engine(inputs)
    evaluator = build_evaluator(config, prompts, tokenizer, engine, world)
    assert evaluator is not None
    return evaluator.evaluate(1)
