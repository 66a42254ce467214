"""``opd generate``."""

from dataclasses import dataclass

from omegaconf import MISSING

from opd.cli.grammar import parse_command_line
from opd.config.arguments import parse_arguments, split_arguments
from opd.run.environment import restart_keeping_memory
from opd.run.recipe import load_recipe

HELP = """usage: opd generate RECIPE out=FILE [model=MODEL] [only_correct=true] [key=value ...]

Generate completions for the recipe's training prompts; they are a data set for data.train with
data.completion_field=completion.

  RECIPE         path of a YAML file, or a bundled recipe (opd train --help lists them)
  out=           JSON lines file to write
  model=         folder, run folder or hub id (default: the recipe's teacher)
  only_correct=  true keeps only completions that the recipe's grader finds correct
  key=value      settings as in opd train

example: opd generate quickstart out=written.jsonl only_correct=true"""


@dataclass(kw_only=True, slots=True)
class GenerateArguments:
    """Keys of `opd generate`; settings of the recipe may follow."""

    out: str = MISSING
    """JSON lines file to write."""
    model: str | None = None
    """Folder, run folder or hub id; by default the recipe's teacher."""
    only_correct: bool = False
    """Keep only completions that the recipe's grader finds correct."""


def main(argv: list[str]) -> None:
    """Parse, run and print."""
    line = parse_command_line(argv, HELP, positionals=("RECIPE",))
    own, overrides = split_arguments(GenerateArguments, line.settings)
    arguments = parse_arguments(GenerateArguments, own)
    recipe = load_recipe(line.positionals[0], *overrides)
    restart_keeping_memory()
    from opd.run.generate import generate  # loads torch, which --help does not need

    counts = generate(
        recipe, model=arguments.model, out=arguments.out, only_correct=arguments.only_correct
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()), f"-> {arguments.out}")
