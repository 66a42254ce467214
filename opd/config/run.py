"""``run``: the name and folder of a run."""

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd.config.schema import Config


class Resume(StrEnum):
    auto = "auto"
    never = "never"


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """Name and folder of the run."""

    name: str = "run"
    """Name of the run; a recipe sets it to its own."""
    dir: str | None = None
    """Folder of the run; by default runs/<name>, and in a sweep runs/<name>/<overrides>."""
    resume: Resume = Resume.auto
    """auto resumes from the newest checkpoint in run.dir; never refuses a folder with a checkpoint."""
    allow_changed_inputs: bool = False
    """Resume although the prompts, the student or a teacher have other contents than when the run began."""


def names_are_printable(config: "Config") -> str | None:
    """A name with control characters would reach the terminal and the file system."""
    for setting, value in (("run.name", config.run.name), ("run.dir", config.run.dir or "x")):
        if not value.isprintable() or not value.strip():
            return f"{setting}={value!r}: allowed are printable characters, at least one"
    return None


RULES = (names_are_printable,)
