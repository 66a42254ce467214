"""Settings that need less memory, in the order in which to try them."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from opd.config.adapter import LoraConfig
from opd.config.launch import LaunchEngine
from opd.config.mask import active_mask
from opd.config.rollout import VllmRolloutConfig
from opd.config.schema import Config, problems
from opd.config.teacher import ServedTeacherConfig
from opd.run.forecast.cards import Forecast

LEAST_SAVED = 64 << 20
SMALL_CHUNK_MIB = 64
SMALL_ENGINE, SMALL_TEACHER = 0.25, 0.3
OFFLOAD = "launch/deepspeed/offload.json"
"""Of a clone; an installation has none."""
CLONE = Path(__file__).parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """A setting, what it saves on the fullest device, and what is free there afterwards."""

    setting: str
    saves: int
    spare: int


def helpful_changes(
    config: Config, now: Forecast, again: Callable[[Config], Forecast | None]
) -> list[Saving]:
    """The changes that save memory, each alone. ``again`` forecasts a changed recipe; None: not possible."""
    before = _fullest(now)
    found = []
    for setting, changed in _candidates(config):
        forecast = again(changed)
        if forecast is None or problems(changed) or set(forecast.cramped) - set(now.cramped):
            continue
        after = _fullest(forecast)
        if after - before >= LEAST_SAVED:
            found.append(Saving(setting=setting, saves=after - before, spare=after))
    return found


def _fullest(found: Forecast) -> int:
    """Free bytes of the fullest device; negative where it does not fit."""
    return min(device.spare for device in found.devices)


def _candidates(config: Config) -> Iterator[tuple[str, Config]]:
    """(setting, recipe with it): what costs nothing first, what changes the training last."""
    teacher, rollout, train = config.teacher, config.rollout, config.train
    if not train.gradient_checkpointing:
        yield _with(config, "train", "gradient_checkpointing", True)
    if train.chunk_mib > SMALL_CHUNK_MIB:
        yield _with(config, "train", "chunk_mib", SMALL_CHUNK_MIB)
    half = train.max_tokens_per_micro_batch // 2
    if half:
        yield _with(config, "train", "max_tokens_per_micro_batch", half)
    if isinstance(teacher, ServedTeacherConfig):
        if not teacher.sleep:
            yield _with(config, "teacher", "sleep", True)
        if (teacher.gpu_memory_utilization or 1) > SMALL_TEACHER:
            yield _with(config, "teacher", "gpu_memory_utilization", SMALL_TEACHER)
        for size in (2, 4, 8):
            if size > (teacher.tensor_parallel_size or 1):
                yield _with(config, "teacher", "tensor_parallel_size", size)
    if (
        isinstance(rollout, VllmRolloutConfig)
        and (rollout.gpu_memory_utilization or 1) > SMALL_ENGINE
    ):
        yield _with(config, "rollout", "gpu_memory_utilization", SMALL_ENGINE)
    if config.launch.engine == LaunchEngine.deepspeed:
        for stage in (2, 3):
            if stage > config.zero:
                changed = deepcopy(config)
                changed.zero = stage
                yield f"zero={stage}", changed
        if config.launch.deepspeed is None and (CLONE / OFFLOAD).is_file():
            _, changed = _with(config, "launch", "deepspeed", str(CLONE / OFFLOAD))
            yield f"launch.deepspeed={OFFLOAD}", changed
    if active_mask(config) is None and not isinstance(config.adapter, LoraConfig):
        changed = deepcopy(config)
        changed.adapter = LoraConfig()
        yield "adapter=lora", changed


def _with(config: Config, group: str, field: str, value: object) -> tuple[str, Config]:
    changed = deepcopy(config)
    setattr(getattr(changed, group), field, value)
    text = str(value).lower() if isinstance(value, bool) else value
    return f"{group}.{field}={text}", changed
