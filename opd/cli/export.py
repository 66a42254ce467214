"""``opd export``."""

from dataclasses import dataclass

from omegaconf import MISSING

from opd.cli.grammar import parse_command_line
from opd.config.arguments import parse_arguments

HELP = """usage: opd export model=RUN out=FOLDER

Write the model of a run, or of one of its checkpoints, as a plain Hugging Face folder that transformers
and vLLM load, with a model card (README.md): recipe, data and figures. The folder can be pushed to a hub.

example: opd export model=runs/quickstart/checkpoints/step_000040 out=exported
"""


@dataclass(kw_only=True, slots=True)
class ExportArguments:
    """Keys of `opd export`."""

    model: str = MISSING
    """Run folder (its final model), or a checkpoint in it: checkpoints/step_..., or checkpoints/best."""
    out: str = MISSING
    """Folder to write; it must be new or empty."""


def main(argv: list[str]) -> None:
    """Parse, run and print."""
    line = parse_command_line(argv, HELP, shown=ExportArguments)
    arguments = parse_arguments(ExportArguments, line.settings)
    from opd.run.export import export  # loads torch, which --help does not need

    step = export(arguments.model, arguments.out)
    print(f"{arguments.model}, step {step} -> {arguments.out}")
