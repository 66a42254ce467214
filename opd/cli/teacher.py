"""``opd teacher``."""

from opd.cli.grammar import parse_command_line
from opd.config.teacher import TeacherServerConfig

HELP = """usage: opd teacher model=MODEL [key=value ...]

Score token sequences over HTTP. The token, if there is one, is in OPD_TEACHER_TOKEN.

example: opd teacher model=Qwen/Qwen3-4B port=8400
"""


def main(words: list[str]) -> None:
    """Parse and serve until SIGTERM or SIGINT."""
    read = parse_command_line(words, HELP, shown=TeacherServerConfig)
    from opd.run import serve  # loads torch, which --help does not need

    serve.main("teacher", read.settings)
