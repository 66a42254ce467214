"""``opd eval``."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from opd.cli.grammar import parse_command_line, usage
from opd.config.arguments import parse_arguments, split_arguments
from opd.run.environment import restart_keeping_memory
from opd.run.model_names import recipe_file
from opd.run.recipe import load_recipe
from opd.run.status import FAILED
from opd.serving.parent import PARENT, watch_parent
from opd.types import Evaluation

HELP = """usage: opd eval [RECIPE] [model=MODEL] [out=FILE] [key=value ...]

Evaluate a checkpoint on the recipe's held-out prompts, without training.

  RECIPE     path of a YAML file, or a bundled recipe (opd train --help lists them); by default the
             settings of the run that model= belongs to
  model=     folder, run folder, checkpoint of a run or hub id (default: the recipe's student)
  out=       JSON file for metrics and transcripts
  key=value  settings as in opd train

example: opd eval quickstart model=runs/quickstart/checkpoints/best eval.k=8"""


@dataclass(kw_only=True, slots=True)
class EvalArguments:
    """Keys of `opd eval`; settings of the recipe may follow."""

    model: str | None = None
    """Folder, run folder, checkpoint of a run, or hub id; by default the recipe's student."""
    out: str | None = None
    """JSON file for metrics and transcripts."""


def main(argv: list[str]) -> None:
    """Parse, run and print."""
    if PARENT in os.environ:  # a run evaluates its teacher
        watch_parent(lambda: os._exit(FAILED))
    line = parse_command_line(argv, HELP, positionals=("RECIPE",), optional=1)
    own, overrides = split_arguments(EvalArguments, line.settings)
    arguments = parse_arguments(EvalArguments, own)
    recipe = load_recipe(_recipe(line.positionals, arguments.model), *overrides)
    restart_keeping_memory()
    from opd.run.evaluate import evaluate  # loads torch, which --help does not need

    model = arguments.model or recipe.config.student.model
    evaluation = evaluate(recipe, model=arguments.model)
    Console(markup=False).print(_table(model, evaluation))
    if arguments.out is not None:
        results = {"model": model, "metrics": evaluation.metrics, "samples": evaluation.samples}
        Path(arguments.out).write_text(json.dumps(results, indent=1, ensure_ascii=False))


def _recipe(given: list[str], model: str | None) -> str | Path:
    """The recipe that is given, else the settings of the run that the model belongs to."""
    if given:
        return given[0]
    written = None if model is None else recipe_file(model)
    if written is None:
        raise ValueError(f"RECIPE is missing, and model= is of no run: {usage(HELP)}")
    return written


def _table(model: str, evaluation: Evaluation) -> Table:
    table = Table("metric", "value", title=model)
    for name, value in evaluation.metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table
