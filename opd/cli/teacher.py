"""``opd teacher``."""

from opd.cli.grammar import parse_command_line
from opd.config.teacher import TeacherServerConfig

HELP = """usage: opd teacher model=MODEL [key=value ...]

Score token sequences over HTTP, at the address that it prints; its token is in OPD_TEACHER_TOKEN.

example: opd teacher model=Qwen/Qwen3-4B port=8400
"""


def main(argv: list[str]) -> None:
    """Parse and serve until SIGTERM or SIGINT."""
    line = parse_command_line(argv, HELP, shown=TeacherServerConfig)
    from opd.run import serve  # loads torch, which --help does not need

    serve.show_log()
    serve.main("teacher", line.settings)
