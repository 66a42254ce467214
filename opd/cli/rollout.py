"""``opd rollout``."""

from opd.cli.grammar import parse_command_line
from opd.config.rollout import RolloutServerConfig

HELP = """usage: opd rollout model=MODEL [key=value ...]

Generate over HTTP for a run with rollout=server. The access token, if any, is in OPD_ROLLOUT_TOKEN.

example: opd rollout model=Qwen/Qwen3-1.7B port=8500
"""


def main(argv: list[str]) -> None:
    """Parse and serve until SIGTERM or SIGINT."""
    line = parse_command_line(argv, HELP, shown=RolloutServerConfig)
    from opd.run import serve  # loads torch, which --help does not need

    serve.show_log()
    serve.main("rollout", line.settings)
