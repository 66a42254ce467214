"""One grammar for every command: positionals, then key=value; flags only --help, --json, -m, --cfg."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields

from opd.config.fields import allowed, default, sentence

HELP_FLAGS = ("-h", "--help")
WIDTH, INDENT = 100, 26


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandLine:
    """The parts of a command line."""

    positionals: list[str]
    settings: list[str]
    flags: set[str]


class HelpShown(SystemExit):
    """The help was printed and there is nothing else to do."""


def parse_command_line(
    arguments: Sequence[str],
    help_text: str,
    *,
    positionals: Sequence[str] = (),
    optional: int = 0,
    flags: Sequence[str] = (),
    shown: type | None = None,
) -> CommandLine:
    """Positionals named ``positionals``, key=value settings, and flags.

    The last ``optional`` positionals may be left out. --help prints ``help_text``, followed by the keys
    of ``shown``, and ends the process with status 0. ValueError for an unknown flag, and for positionals
    that are missing or too many.
    """
    if any(argument in HELP_FLAGS for argument in arguments):
        print(help_text if shown is None else f"{help_text}\n{describe_keys(shown)}")
        raise HelpShown(0)
    given_flags = [argument for argument in arguments if argument.startswith("-")]
    for flag in given_flags:
        if flag not in flags:
            name = flag.lstrip("-").partition("=")[0].replace("-", "_")
            raise ValueError(
                f"unknown option {flag}: settings are written key=value, as {name}=...; "
                f"flags here are {', '.join([*flags, '--help'])}"
            )
    rest = [argument for argument in arguments if argument not in given_flags]
    settings = [argument for argument in rest if "=" in argument or argument.startswith("~")]
    given = [argument for argument in rest if argument not in settings]
    if len(given) < len(positionals) - optional:
        raise ValueError(f"{positionals[len(given)]} is missing: {usage(help_text)}")
    if len(given) > len(positionals):
        extra = given[len(positionals)]
        raise ValueError(f"unexpected argument {extra}: {usage(help_text)}")
    return CommandLine(positionals=given, settings=settings, flags=set(given_flags))


def usage(help_text: str) -> str:
    """The first line of a help text."""
    return help_text.strip().splitlines()[0]


def describe_keys(kind: type) -> str:
    """Each key of a dataclass: its default, its sentence, and what is allowed."""
    lines = ["keys:"]
    for field in fields(kind):
        left = f"  {field.name}={default(field)}"
        limits = allowed(field)
        text = sentence(kind, field.name).rstrip(".") + (f" ({limits})" if limits else "")
        wrapped = textwrap.wrap(text, WIDTH - INDENT)
        if len(left) > INDENT - 2:  # a long default has a line to itself
            lines.append(left)
        else:
            lines.append(f"{left:{INDENT}}{wrapped.pop(0)}")
        lines += [" " * INDENT + line for line in wrapped]
    return "\n".join(lines)
