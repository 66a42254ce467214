"""``run``: the name and folder of a run."""

from dataclasses import dataclass
from enum import StrEnum


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
