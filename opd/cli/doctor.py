"""``opd doctor``."""

from opd.cli.grammar import parse_command_line

HELP = """usage: opd doctor RECIPE [key=value ...]

Check a recipe before it costs anything: settings, packages, run folder, model, tokenizer and chat
template, data, teacher, mask; then score the student by itself where that is cheap (loss 0).

  RECIPE     path of a YAML file, or a bundled recipe (opd train --help lists them)
  key=value  settings as in opd train

example: opd doctor quickstart loss=topk_reverse_kl loss.k=64"""


def main(argv: list[str]) -> None:
    """Parse and run."""
    line = parse_command_line(argv, HELP, positionals=("RECIPE",))
    from opd.run.doctor import doctor  # loads torch, which --help does not need

    doctor(line.positionals[0], line.settings)
