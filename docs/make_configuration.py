"""Write docs/configuration.md from opd/config/: every setting, its default, bounds and sentence."""

import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from opd import config
from opd.config.fields import allowed, default, sentence

OUT = Path(__file__).parent / "configuration.md"
GROUP_OF = {"teacher", "rollout", "loss", "optim", "adapter", "tracking"}


def rows(cls: type, prefix: str) -> Iterator[str]:
    """One table row for each field of a dataclass that is not itself one."""
    for field in fields(cls):
        if not is_dataclass(field.type):
            told = sentence(cls, field.name)
            yield f"| `{prefix}{field.name}` | {default(field)} | {allowed(field)} | {told} |"


def table(lines: Iterator[str]) -> str:
    body = "\n".join(lines)
    return (
        f"| setting | default | allowed | what it is |\n|---|---|---|---|\n{body}\n" if body else ""
    )


def page() -> str:
    """The whole document."""
    parts = [
        "# Configuration\n\nMade by `make docs` from `opd/config/`; do not edit. A setting is typed as "
        "`key=value` behind `opd train RECIPE`, or written into a recipe. A group (`loss=jsd`) is "
        "chosen by its name. `opd train RECIPE --cfg` prints what they come to.\n",
        "## Run\n\n" + table(rows(config.Config, "")),
    ]
    for field in fields(config.Config):
        if is_dataclass(field.type) and field.name not in GROUP_OF:
            doc = (field.type.__doc__ or "").strip()
            parts.append(f"## {field.name}\n\n{doc}\n\n{table(rows(field.type, f'{field.name}.'))}")
    for group, choices in config.GROUPS.items():
        names: dict[type, list[str]] = {}
        for name, choice in choices.items():
            names.setdefault(choice if isinstance(choice, type) else type(choice), []).append(name)
        for cls, chosen in names.items():
            title = " | ".join(f"{group}={name}" for name in chosen)
            doc = (cls.__doc__ or "").strip()
            parts.append(f"## {title}\n\n{doc}\n\n{table(rows(cls, f'{group}.'))}")
    return "\n".join(parts)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(
            0 if OUT.read_text() == page() else "docs/configuration.md is stale: run make docs"
        )
    OUT.write_text(page())
