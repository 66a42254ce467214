"""Hydra's and OmegaConf's errors as one-line messages: what was found, what is allowed, what to do."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any

from opd.config.fields import expected
from opd.config.schema import FORMER_NAMES, GROUPS, Config

UNKNOWN = re.compile(r"Key '([^']+)' (?:is )?not in '")
UNKNOWN_CHOICE = re.compile(r"Could not find '(\w+)/([^']*)'")
BAD_VALUE = re.compile(r"(?:Invalid value|Value) '(.*?)'(?:,| of type)")
FULL_KEY = re.compile(r"full_key: (\S+)")
OVERRIDE = re.compile(r"Could not override '([^']+)'")
NOISE = (
    "full_key",
    "object_type",
    "reference_type",
    "Set the environment",
    "To append",
    "See http",
    "^",
)
CLASS_NAME = re.compile(r"^\w+(?:Exception|Error): ")


def require_present_names(overrides: Sequence[str]) -> None:
    """ValueError when an override uses the former name of a setting."""
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in FORMER_NAMES:
            raise ValueError(now_called(key))


def now_called(key: str) -> str:
    """The message for a former name of a setting."""
    return f"{key} is now called {FORMER_NAMES[key]}: use that name"


def explain(error: BaseException) -> str:
    """The message for an error of Hydra or OmegaConf, in the words of our settings."""
    reasons: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        reasons += [line for line in str(cause).splitlines() if not any(line in r for r in reasons)]
        cause = cause.__cause__
    text = "\n".join(reasons)
    if UNKNOWN.search(text):
        return _unknown_key(text)
    explained = _unknown_choice(text) or _bad_value(text)
    if explained is not None:
        return explained
    kept = text.split("Config search path:")[0].splitlines()
    lines = (k.strip() for k in kept if k.strip() and not k.strip().startswith(NOISE))
    return CLASS_NAME.sub("", " ".join(dict.fromkeys(lines)))


def _unknown_choice(text: str) -> str | None:
    named = UNKNOWN_CHOICE.search(text)
    if named is None or named.group(1) not in GROUPS:
        return None
    group, choice = named.groups()
    return f"there is no {group}={choice}: allowed are {', '.join(GROUPS[group])}"


def _bad_value(text: str) -> str | None:
    """A value of another type than its setting, named with the setting."""
    key, value = FULL_KEY.search(text), BAD_VALUE.search(text)
    field = None if key is None else dict(_settings()).get(key.group(1))
    if key is None or value is None or field is None:
        return None
    return f"{key.group(1)}={value.group(1)}: expected {expected(field)}"


def _unknown_key(text: str) -> str:
    named = OVERRIDE.search(text) or FULL_KEY.search(text) or UNKNOWN.search(text)
    assert named is not None
    return unknown_setting(named.group(1))


def unreadable(override: str) -> str:
    """The message for an override that Hydra's grammar does not allow."""
    return (
        f"{override!r} cannot be read as key=value: put quotes around a value with blanks, brackets or "
        """signs, as in "key='a b'\""""
    )


def unknown_setting(key: str) -> str:
    """The message for a setting that there is not, or not with the choice that was made."""
    if key in FORMER_NAMES:
        return now_called(key)
    known = sorted(set(known_keys()))
    if key in known:
        return (
            f"{key} is a setting of {_choices_with(key)}, not of the choice that was made: make that "
            "choice too, or remove the setting"
        )
    leaves = {k.split(".")[-1]: k for k in known}
    near = difflib.get_close_matches(key, GROUPS, n=1, cutoff=0.6)
    near += difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    near += [leaves[n] for n in difflib.get_close_matches(key.split(".")[-1], leaves, n=2)]
    siblings = [k for k in known if k.rsplit(".", 1)[0] == key.rsplit(".", 1)[0] and "." in key]
    meant = f"did you mean {' or '.join(dict.fromkeys(near))}? " if near else ""
    allowed = f"allowed there: {', '.join(siblings)}; " if siblings else ""
    return f"there is no setting {key}: {meant}{allowed}see docs/configuration.md"


def _choices_with(key: str) -> str:
    group = key.split(".")[0]
    names = [
        f"{group}={name}"
        for name, choice in GROUPS.get(group, {}).items()
        if key in dict(_fields(choice, f"{group}."))
    ]
    return " or ".join(names)


def known_keys() -> Iterator[str]:
    """Every setting of every group choice, as it is typed."""
    return (key for key, _ in _settings())


def _settings() -> Iterator[tuple[str, Field[Any]]]:
    yield from _fields(Config, "")
    for group, choices in GROUPS.items():
        for choice in choices.values():
            yield from _fields(choice, f"{group}.")


def _fields(node: Any, path: str) -> Iterator[tuple[str, Field[Any]]]:
    for field in fields(node):
        name = f"{path}{field.name}"
        if is_dataclass(field.type):
            yield from _fields(field.type, f"{name}.")
        else:
            yield name, field
