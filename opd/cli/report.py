"""``opd report``."""

from pathlib import Path

from opd.cli.grammar import parse_command_line, usage

HELP = """usage: opd report RUN [RUN ...] [out=DIR]

Put runs side by side: a table here, and a page (comparison.html) and a csv.

  RUN    folder of a run
  out=   folder for comparison.html and comparison.csv (default: here)

example: opd report runs/quickstart runs/contrast_quickstart out=comparison"""


def main(words: list[str]) -> None:
    """Parse and run. A run's folder may hold = in its name."""
    parse_command_line([word for word in words if word.startswith("-")], HELP)
    outs = [word.removeprefix("out=") for word in words if word.startswith("out=")]
    runs = [Path(word) for word in words if not word.startswith("out=")]
    if not runs:
        raise ValueError(f"RUN is missing: {usage(HELP)}")
    from opd.run.train import compare  # loads matplotlib, which --help does not need

    compare(runs, Path(outs[-1] if outs else "."))
