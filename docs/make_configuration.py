"""Write docs/configuration.md from opd/config.py: every setting, its default, bounds and sentence."""

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from opd import config

SOURCE = Path(config.__file__)
OUT = Path(__file__).parent / "configuration.md"
GROUP_OF = {"teacher", "rollout", "loss", "optim", "adapter", "tracking"}


def sentences() -> dict[tuple[str, str], str]:
    """(class, field) -> the string literal under the field."""
    found: dict[tuple[str, str], str] = {}
    for node in ast.parse(SOURCE.read_text()).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field_node, under in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field_node, ast.AnnAssign)
                and isinstance(field_node.target, ast.Name)
                and isinstance(under, ast.Expr)
                and isinstance(under.value, ast.Constant)
            ):
                found[node.name, field_node.target.id] = str(under.value.value)
    return found


def sentence(cls: type, name: str, known: dict[tuple[str, str], str]) -> str:
    """The field's sentence, the class's own or the nearest ancestor's."""
    for ancestor in cls.__mro__:
        if (ancestor.__name__, name) in known:
            return known[ancestor.__name__, name]
    return ""


def default(field: Field[Any]) -> str:
    """The default as one types it."""
    value = field.default if field.default is not MISSING else None
    if field.default is MISSING and field.default_factory is not MISSING:
        value = field.default_factory()
    if isinstance(value, Enum):
        return str(value.value)
    if value == config.MISSING:
        return "*required*"
    return value if isinstance(value, str) else json.dumps(value)


def allowed(field: Field[Any]) -> str:
    """Choices of an enumeration, or bounds."""
    if isinstance(field.type, type) and issubclass(field.type, Enum):
        return ", ".join(str(choice.value) for choice in field.type)
    signs = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
    return ", ".join(f"{signs[name]} {bound:g}" for name, bound in field.metadata.items())


def rows(cls: type, prefix: str, known: dict[tuple[str, str], str]) -> Iterator[str]:
    """One table row for each field of a dataclass that is not itself one."""
    for field in fields(cls):
        if not is_dataclass(field.type):
            told = sentence(cls, field.name, known)
            yield f"| `{prefix}{field.name}` | {default(field)} | {allowed(field)} | {told} |"


def table(lines: Iterator[str]) -> str:
    body = "\n".join(lines)
    return (
        f"| setting | default | allowed | what it is |\n|---|---|---|---|\n{body}\n" if body else ""
    )


def page() -> str:
    """The whole document."""
    known = sentences()
    parts = [
        "# Configuration\n\nMade by `make docs` from `opd/config.py`; do not edit. A setting is typed as "
        "`key=value` behind `opd train RECIPE`, or written into a recipe. A group (`loss=jsd`) is "
        "chosen by its name. `opd train RECIPE --cfg` prints what they come to.\n",
        "## Run\n\n" + table(rows(config.Config, "", known)),
    ]
    for field in fields(config.Config):
        if is_dataclass(field.type) and field.name not in GROUP_OF:
            doc = (field.type.__doc__ or "").strip()
            parts.append(
                f"## {field.name}\n\n{doc}\n\n{table(rows(field.type, f'{field.name}.', known))}"
            )
    for group, choices in config.GROUPS.items():
        names: dict[type, list[str]] = {}
        for name, choice in choices.items():
            names.setdefault(choice if isinstance(choice, type) else type(choice), []).append(name)
        for cls, chosen in names.items():
            title = " | ".join(f"{group}={name}" for name in chosen)
            doc = (cls.__doc__ or "").strip()
            parts.append(f"## {title}\n\n{doc}\n\n{table(rows(cls, f'{group}.', known))}")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0 if OUT.read_text() == page() else "docs/configuration.md is stale: run make docs"
        )
    OUT.write_text(page())
