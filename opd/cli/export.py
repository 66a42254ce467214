"""``opd export``."""

from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from opd.cli.grammar import parse_command_line
from opd.config.arguments import parse_arguments

HELP = """usage: opd export model=RUN out=DIR

Write the final model of a run, or one of its checkpoints, as a Hugging Face folder with a model
card.

example: opd export model=runs/quickstart/checkpoints/step_000040 out=step_40
"""


@dataclass(kw_only=True, slots=True)
class ExportModelArguments:
    """Keys of `opd export`."""

    model: str = MISSING
    """A run folder (its final/), or one of its checkpoints, such as runs/x/checkpoints/best."""
    out: str = MISSING
    """Folder to write: weights, configuration, tokenizer and README.md (a model card)."""


def main(argv: list[str]) -> None:
    """Parse, run and print."""
    line = parse_command_line(argv, HELP, shown=ExportModelArguments)
    arguments = parse_arguments(ExportModelArguments, line.settings)
    from opd.run.export import write_model  # loads torch, which --help does not need

    out = write_model(arguments.model, Path(arguments.out))
    print(f"{out}: a model that transformers and vLLM load, and README.md, its card")
    print(f"to a hub: hf upload OWNER/NAME {out}")
