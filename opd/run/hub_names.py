"""The settings of a run that name something on a hub, and whether this machine has it."""

import re
from pathlib import Path

from opd.config.schema import Config
from opd.config.sources import source_paths
from opd.config.teacher import PoolTeacherConfig
from opd.run.hub import is_cached

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def hub_names(config: Config) -> list[str]:
    """Settings that name a model or data set on a hub: owner/name, and no such local path."""
    teacher = config.teacher
    members = teacher.members if isinstance(teacher, PoolTeacherConfig) else {}
    named = [
        ("student.model", config.student.model),
        ("teacher.model", teacher.model),
        *((f"teacher.members.{name}", member) for name, member in members.items()),
        *(("data.train", path) for path in source_paths(config.data.train)),
        *(("data.eval", path) for path in source_paths(config.data.eval)),
        *(("eval.kl_data", path) for path in source_paths(config.eval.kl_data)),
    ]
    return [
        f"{setting}={name}"
        for setting, name in named
        if name and HUB_NAME.fullmatch(name) and not Path(name).exists()
    ]


def require_cached(named: list[str]) -> None:
    """ValueError for those of ``hub_names`` of which nothing is in the caches of this machine."""
    absent = [one for one in named if not is_cached(one.partition("=")[2])]
    if absent:
        raise ValueError(
            f"{', '.join(absent)}: there is no such path in {Path.cwd()}, nothing of that name is in the "
            "cache, and the hub cannot be reached: correct the path, or download it where it can be"
        )
