"""Hydra's and OmegaConf's errors as one sentence for the person who typed the command."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from opd.config.schema import FORMER_NAMES, GROUPS, Config

UNKNOWN = re.compile(r"Key '([^']+)' (?:is )?not in '")
FULL_KEY = re.compile(r"full_key: (\S+)")
OVERRIDE = re.compile(r"Could not override '([^']+)'")
NOISE = ("full_key", "object_type", "reference_type", "Set the environment", "To append")


def require_present_names(overrides: Sequence[str]) -> None:
    """ValueError when an override uses the former name of a setting."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in FORMER_NAMES:
            raise ValueError(now_called(key))


def now_called(key: str) -> str:
    """What a former name of a setting has become."""
    return f"{key} is now called {FORMER_NAMES[key]}: use that name"


def explain(error: BaseException) -> str:
    """The reasons without Hydra's internals; an unknown key with the nearest ones."""
    reasons: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        reasons += [line for line in str(cause).splitlines() if not any(line in r for r in reasons)]
        cause = cause.__cause__
    text = "\n".join(reasons)
    if UNKNOWN.search(text):
        return _unknown_key(text)
    kept = text.split("Config search path:")[0].splitlines()
    return "\n".join(k.rstrip() for k in kept if k.strip() and not k.strip().startswith(NOISE))


def _unknown_key(text: str) -> str:
    named = OVERRIDE.search(text) or FULL_KEY.search(text) or UNKNOWN.search(text)
    assert named is not None
    key = named.group(1)
    if key in FORMER_NAMES:
        return now_called(key)
    known = sorted(set(known_keys()))
    if key in known:
        return (
            f"{key} is a setting of {_choices_with(key)}, not of the choice that was made: choose that "
            "one too, or take the setting out"
        )
    leaves = {k.split(".")[-1]: k for k in known}
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    near += [leaves[n] for n in difflib.get_close_matches(key.split(".")[-1], leaves, n=2)]
    siblings = [k for k in known if k.rsplit(".", 1)[0] == key.rsplit(".", 1)[0] and "." in key]
    meant = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    allowed = f"allowed there: {', '.join(siblings)}; " if siblings else ""
    return f"{key} is not a setting of this choice: {meant}{allowed}see docs/configuration.md"


def _choices_with(key: str) -> str:
    group = key.split(".")[0]
    names = [
        f"{group}={name}"
        for name, choice in GROUPS.get(group, {}).items()
        if key in _keys(choice, f"{group}.")
    ]
    return " or ".join(names)


def known_keys() -> Iterator[str]:
    """Every setting of every group choice, as it is typed."""
    yield from _keys(Config, "")
    for group, choices in GROUPS.items():
        for choice in choices.values():
            yield from _keys(choice, f"{group}.")


def _keys(node: Any, path: str) -> Iterator[str]:
    for f in fields(node):
        name = f"{path}{f.name}"
        if is_dataclass(f.type):
            yield from _keys(f.type, f"{name}.")
        else:
            yield name
