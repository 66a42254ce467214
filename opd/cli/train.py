"""``opd train``."""

from opd.cli.grammar import parse_command_line
from opd.run.recipe import bundled_recipes

HELP = f"""usage: opd train RECIPE [key=value ...] [-m] [--cfg]

Train a student from a teacher. An existing run folder is resumed.

  RECIPE     path of a YAML file, or a bundled recipe:
{chr(10).join(f"             {name}" for name in sorted(bundled_recipes()))}
  key=value  settings as in Hydra: loss=jsd optim.lr=1e-4; docs/configuration.md lists them
  -m         run every combination of a=1,2 b=3,4, then compare
  --cfg      print the composed configuration and stop

  dry_run=true checks all that can be checked without training, prints the plan and writes
  dry_run.yaml into the run folder.

example: opd train quickstart -m optim=adamw,sgd optim.lr=1e-3,1e-2"""


def main(argv: list[str]) -> None:
    """Parse and run."""
    line = parse_command_line(
        argv, HELP, positionals=("RECIPE",), flags=("-m", "--multirun", "--cfg")
    )
    from opd.run import train  # loads transformers, which --help does not need

    (recipe,) = line.positionals
    if "--cfg" in line.flags:
        train.print_config(recipe, *line.settings)
    elif line.flags & {"-m", "--multirun"}:
        train.train_all(recipe, *line.settings)
    else:
        train.train(recipe, *line.settings)
