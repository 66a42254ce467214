"""The data sets that data.train and data.eval name: one path, or a list of paths and of mappings."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.config.data import DataConfig

if TYPE_CHECKING:
    from opd.config.schema import Config

_OF_ALL_SOURCES = {
    "train",
    "eval",
    "streaming",
    "filter_overlong_prompts",
    "chat_template",
    "teacher_chat_template",
}
"""Settings of data that an entry of a list cannot have, besides those of evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSource:
    """One data set: its path or hub id, how its rows are read, and its share of each step.

    ``weight`` is None where the prompts of all sources are one pool.
    """

    path: str
    data: DataConfig
    weight: float | None = None


def data_sources(setting: str, value: Any, data: DataConfig) -> list[DataSource]:
    """The sources that ``value`` of ``setting`` names, each with ``data`` and its own settings on top.

    Raises ValueError for a value of another form, an unknown setting, and weights for some only.
    """
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ValueError(f"{setting} is an empty list: name at least one data set")
    sources = [_source(setting, entry, data) for entry in entries]
    weighted = [source for source in sources if source.weight is not None]
    if 0 < len(weighted) < len(sources):
        raise ValueError(
            f"{setting} has a weight for {len(weighted)} of {len(sources)} data sets: give each a weight, "
            "or none"
        )
    return sources


def source_paths(value: Any) -> list[str]:
    """The paths and hub ids in a value of data.train; nothing for what is not one."""
    entries = value if isinstance(value, list) else [value]
    paths = [entry.get("path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [path for path in paths if isinstance(path, str)]


def _source(setting: str, entry: Any, data: DataConfig) -> DataSource:
    if isinstance(entry, str) and entry:
        return DataSource(path=entry, data=data)
    path = entry.get("path") if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping) or not isinstance(path, str) or not path:
        raise ValueError(
            f"{setting}: found {str(entry)[:60]!r}; expected a path or a hub id, or in a list "
            "{path: ..., weight: ..., split: ...}"
        )
    own = {str(key): inner for key, inner in entry.items() if key not in ("path", "weight")}
    allowed = {f.name for f in fields(DataConfig)} - _OF_ALL_SOURCES
    allowed = {name for name in allowed if not name.startswith("eval_")}
    if unknown := sorted(set(own) - allowed):
        raise ValueError(
            f"{setting}: {path} has the unknown setting {unknown[0]!r}; allowed are path, weight, "
            f"{', '.join(sorted(allowed))}"
        )
    try:
        typed = OmegaConf.structured(replace(data, train=path, eval=None))
        read = OmegaConf.to_object(OmegaConf.merge(typed, own))
    except OmegaConfBaseException as error:
        raise ValueError(f"{setting}: {path}: {str(error).splitlines()[0]}; correct it") from None
    assert isinstance(read, DataConfig)
    return DataSource(path=path, data=read, weight=_weight(setting, path, entry.get("weight")))


def _weight(setting: str, path: str, weight: Any) -> float | None:
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ValueError(f"{setting}: {path} has weight {weight!r}; allowed is a number above 0")
    return float(weight)


def sources_can_be_read(config: "Config") -> str | None:
    """data.train and data.eval name data sets, and only training prompts have weights."""
    data = config.data
    try:
        data_sources("data.train", data.train, data)
        if data.eval is None:
            return None
        held_out = data_sources("data.eval", data.eval, data.for_eval())
    except ValueError as error:
        return str(error)
    if any(source.weight is not None for source in held_out):
        return "data.eval has weights, and every held-out prompt is evaluated once: leave them out"
    return None


RULES = (sources_can_be_read,)
