"""``opd report``."""

from pathlib import Path

from opd.cli.grammar import parse_command_line, usage

HELP = """usage: opd report RUN [RUN ...] [out=DIR]

Compare runs: a table on the terminal, a page (comparison.html) and a csv.

  RUN    folder of a run
  out=   folder for comparison.html and comparison.csv (default: the working directory)

example: opd report runs/quickstart runs/contrast_quickstart out=comparison"""


def main(argv: list[str]) -> None:
    """Parse and run. The name of a run's folder may contain =."""
    parse_command_line([argument for argument in argv if argument.startswith("-")], HELP)
    outs = [a.removeprefix("out=") for a in argv if a.startswith("out=")]
    runs = [Path(a) for a in argv if not a.startswith("out=")]
    if not runs:
        raise ValueError(f"RUN is missing: {usage(HELP)}")
    from opd.run.train import compare  # loads matplotlib, which --help does not need

    compare(runs, Path(outs[-1] if outs else "."))
