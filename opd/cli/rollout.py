"""``opd rollout``."""

from opd.cli.grammar import parse_command_line
from opd.config.rollout import RolloutServerConfig

HELP = """usage: opd rollout model=MODEL [key=value ...]

Generate over HTTP for a run with rollout=server. The token, if there is one, is in
OPD_ROLLOUT_TOKEN.

example: opd rollout model=Qwen/Qwen3-1.7B port=8500
"""


def main(words: list[str]) -> None:
    """Parse and serve until SIGTERM or SIGINT."""
    read = parse_command_line(words, HELP, shown=RolloutServerConfig)
    from opd.run import serve  # loads torch, which --help does not need

    serve.main("rollout", read.settings)
