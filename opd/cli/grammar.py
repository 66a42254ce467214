"""One grammar for every command: positionals, then key=value; flags only --help, --json, -m, --cfg."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields

from opd.config.fields import allowed, default, sentence

HELP_FLAGS = ("-h", "--help")
WIDTH, INDENT = 100, 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Words:
    """A command line taken apart."""

    positionals: list[str]
    settings: list[str]
    flags: set[str]


class HelpShown(SystemExit):
    """The help was printed and there is nothing else to do."""


def read_words(
    words: Sequence[str],
    help_text: str,
    *,
    positionals: Sequence[str] = (),
    flags: Sequence[str] = (),
    shown: type | None = None,
) -> Words:
    """Positionals named ``positionals``, key=value words, and flags.

    --help prints ``help_text``, followed by the keys of ``shown``, and ends the process with status
    0. ValueError for an unknown flag, and for positionals that are missing or too many.
    """
    if any(word in HELP_FLAGS for word in words):
        print(help_text if shown is None else f"{help_text}\n{keys(shown)}")
        raise HelpShown(0)
    found = [word for word in words if word.startswith("-")]
    for flag in found:
        if flag not in flags:
            name = flag.lstrip("-").partition("=")[0].replace("-", "_")
            raise ValueError(
                f"unknown option {flag}: settings are written key=value, as {name}=...; "
                f"flags here are {', '.join([*flags, '--help'])}"
            )
    rest = [word for word in words if word not in found]
    settings = [word for word in rest if "=" in word or word.startswith("~")]
    given = [word for word in rest if word not in settings]
    if len(given) < len(positionals):
        raise ValueError(f"{positionals[len(given)]} is missing: {usage(help_text)}")
    if len(given) > len(positionals):
        extra = given[len(positionals)]
        raise ValueError(f"unexpected argument {extra}: {usage(help_text)}")
    return Words(positionals=given, settings=settings, flags=set(found))


def usage(help_text: str) -> str:
    """The first line of a help text."""
    return help_text.strip().splitlines()[0]


def keys(kind: type) -> str:
    """Each key of a dataclass: its default, its sentence, and what is allowed."""
    lines = []
    for field in fields(kind):
        left = f"  {field.name}={default(field)}"
        limits = allowed(field)
        text = sentence(kind, field.name).rstrip(".") + (f" ({limits})" if limits else "")
        first, *more = textwrap.wrap(text, WIDTH - INDENT)
        lines += [f"{left:{INDENT - 2}}  {first}", *(" " * INDENT + line for line in more)]
    return "\n".join(["keys:", *lines])
