"""The command ``opd``: each sub-command is a module of this folder, imported when it is called."""

import atexit
import importlib
import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from opd.faults import RunError
from opd.run.status import DONE, FAILED, USAGE_ERROR


@dataclass(frozen=True, slots=True)
class Command:
    """``module`` has ``HELP`` and ``main(argv)``."""

    module: str
    summary: str


COMMANDS = {
    "train": Command("opd.cli.train", "train a student from a teacher; an existing run is resumed"),
    "doctor": Command("opd.cli.doctor", "check a recipe before it costs anything"),
    "plan": Command("opd.cli.plan", "forecast memory, bytes and time of a run on given GPUs"),
    "eval": Command("opd.cli.evaluate", "evaluate a checkpoint on the recipe's held-out prompts"),
    "export": Command("opd.cli.export", "write a checkpoint of a run as a model with a model card"),
    "generate": Command(
        "opd.cli.generate", "generate completions for the training prompts: a data set"
    ),
    "report": Command("opd.cli.report", "compare runs: a table, one page and a csv"),
    "mask": Command("opd.cli.mask", "discover, show, compare, combine masks; export, apply, undo"),
    "analyze": Command(
        "opd.cli.analyze", "what training changed in the weights, compared with rounding"
    ),
    "prune": Command(
        "opd.cli.prune", "revert part of what training changed, and evaluate the rest"
    ),
    "teacher": Command("opd.cli.teacher", "serve a teacher over HTTP"),
    "rollout": Command("opd.cli.rollout", "generate over HTTP for a run"),
}
FORMER_COMMANDS = {"write": "generate"}

SHOWN_CHARACTERS = 200
LONG_WORD = re.compile(rf"\S{{{2 * SHOWN_CHARACTERS},}}")
"""A word that is no name that anybody reads."""

HELP = """usage: opd COMMAND [ARGUMENTS] [key=value ...]

On-policy distillation: a student writes, a teacher scores every token, the student learns.

{commands}

Settings are written key=value. Flags are --help, --json, -m (every combination) and --cfg.
`opd COMMAND --help` explains a command. Exit status: 0 done, 2 a usage or configuration error,
1 anything else.

example: opd train quickstart loss=jsd optim.lr=1e-4
"""


def main() -> None:
    """Entry point; exits with the status of ``run``."""
    warnings.filterwarnings("ignore", message=".*hydra.searchpath.*")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, also in the logs of a run
    _leave(run(sys.argv[1:]))


def _leave(status: int) -> NoReturn:
    """Exit; at once where a process group was made, after which an interpreter may abort at its exit."""
    world = sys.modules.get("opd.world")  # not loaded for --help
    if world is not None and world.has_group():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(argv: Sequence[str]) -> int:
    """Run one command line. Returns 0: done; 2: a usage or configuration error; 1: any other failure."""
    try:
        _run(list(argv))
    except ValueError as error:
        _report(str(error))
        return USAGE_ERROR
    except OSError as error:
        _report(_sentence(error))
        return FAILED
    except RunError as error:
        _report(str(error))
        return FAILED
    except KeyboardInterrupt:
        print(
            "opd: interrupted; the same command resumes from the last checkpoint", file=sys.stderr
        )
        return FAILED
    return DONE


def _report(message: str) -> None:
    print(f"opd: {readable(message)}", file=sys.stderr)


def readable(message: str) -> str:
    """A message for a terminal: control characters are shown and not sent, very long words are cut."""
    short = LONG_WORD.sub(lambda word: f"{word[0][:SHOWN_CHARACTERS]}...", message)
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in short)


def _sentence(error: OSError) -> str:
    """The file and what is wrong with it, such as a full disk, or the message of a lost connection."""
    if error.strerror is None:
        return " ".join(str(error).split())
    files = " and ".join(str(f) for f in (error.filename, error.filename2) if f is not None)
    return f"{files}: {error.strerror}" if files else error.strerror


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        lines = (f"  {name:10} {command.summary}" for name, command in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return
    if argv[0] == "--version":
        print(f"opd {importlib.metadata.version('opd')}")
        return
    name = argv[0]
    if name in FORMER_COMMANDS:
        raise ValueError(f"opd {name} is now called opd {FORMER_COMMANDS[name]}: use that name")
    if name not in COMMANDS:
        raise ValueError(f"there is no command opd {name}: allowed are {', '.join(COMMANDS)}")
    command = importlib.import_module(COMMANDS[name].module)
    command.main(argv[1:])


if __name__ == "__main__":
    main()
