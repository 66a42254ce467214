"""``opd train``."""

from opd.cli.grammar import parse_command_line
from opd.run.recipe import bundled_recipes

HELP = f"""usage: opd train RECIPE [key=value ...] [-m] [--cfg]

Train a student from a teacher. A run folder that is there is resumed.

  RECIPE     path of a YAML file, or a bundled recipe:
{chr(10).join(f"             {name}" for name in sorted(bundled_recipes()))}
  key=value  settings as in Hydra: loss=jsd optim.lr=1e-4; docs/configuration.md lists them
  -m         run every combination of a=1,2 b=3,4, then compare
  --cfg      print the composed configuration and stop

  dry_run=true checks everything that can be checked without training and prints the plan.

example: opd train quickstart -m optim=adamw,sgd optim.lr=1e-3,1e-2"""


def main(words: list[str]) -> None:
    """Parse and run."""
    read = parse_command_line(
        words, HELP, positionals=("RECIPE",), flags=("-m", "--multirun", "--cfg")
    )
    from opd.run import train  # loads transformers, which --help does not need

    (recipe,) = read.positionals
    if "--cfg" in read.flags:
        train.print_config(recipe, *read.settings)
    elif read.flags & {"-m", "--multirun"}:
        train.train_all(recipe, *read.settings)
    else:
        train.train(recipe, *read.settings)
