"""One rank for each card; servers on the cards that their settings name, else on the first ones."""

from opd.config.rollout import ServerRolloutConfig, VllmRolloutConfig
from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig, ServedTeacherConfig
from opd.run.forecast.engines import placed_models
from opd.run.placement import Cards, PlacedServer, Placement


def place_simply(config: Config, cards: Cards) -> Placement:
    """The placement that the settings describe. Raises ValueError for more ranks or servers than cards."""
    processes, count = config.launch.processes, cards.count
    if count and processes > count:
        raise ValueError(
            f"launch.processes={processes} needs as many GPUs and there are {count}: set "
            f"launch.processes={count}, or plan for more (gpus={processes})"
        )
    rollout = config.rollout
    starts = isinstance(rollout, ServerRolloutConfig) and not rollout.urls
    return Placement(
        cards=cards,
        ranks=tuple(rank if count else None for rank in range(processes)),
        engine_utilization=rollout.gpu_memory_utilization
        if isinstance(rollout, VllmRolloutConfig)
        else 0.0,
        rollout_servers=tuple(
            PlacedServer(
                model=config.student.model,
                cards=_cards(rollout.devices, 1, number, cards),
                gpu_memory_utilization=rollout.gpu_memory_utilization,
            )
            for number in range(rollout.servers)
        )
        if isinstance(rollout, ServerRolloutConfig) and starts
        else (),
        teachers=_teachers(config, cards),
    )


def _teachers(config: Config, cards: Cards) -> tuple[PlacedServer, ...]:
    teacher = config.teacher
    if not isinstance(teacher, ServedTeacherConfig):
        return ()
    replicas = teacher.replicas if isinstance(teacher, PoolTeacherConfig) else 1
    models = [model for model in placed_models(config) for _ in range(replicas)]
    return tuple(
        PlacedServer(
            model=model,
            cards=_cards(teacher.devices, teacher.tensor_parallel_size, number, cards),
            gpu_memory_utilization=teacher.gpu_memory_utilization,
        )
        for number, model in enumerate(models)
    )


def _cards(devices: str | None, width: int, number: int, cards: Cards) -> tuple[int, ...]:
    if not cards.count:
        return ()
    named = [int(d) for d in devices.split(",")] if devices else list(range(cards.count))
    if max(named) >= cards.count or width > len(named):
        raise ValueError(
            f"a server needs {width} of the GPUs {', '.join(map(str, named))} and there are {cards.count}: "
            "name fewer (devices), or plan for more (gpus=...)"
        )
    first = number * width % len(named)
    return tuple((named + named)[first : first + width])
