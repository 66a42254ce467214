"""The forecast of a run, and the sentences about cards that are too small for it."""

from collections.abc import Iterator
from dataclasses import dataclass

from opd.config.rollout import engine_dtype
from opd.config.schema import Config
from opd.run.forecast import engines, learner
from opd.run.forecast.gpu_cards import gpu_devices
from opd.run.forecast.gpus import GIB
from opd.run.forecast.processes import process_devices
from opd.run.forecast.rank import Device, Models, Rank
from opd.run.forecast.setup import TrainingSetup, read_learner
from opd.run.model_facts import ModelFacts
from opd.run.placement import Cards, PlacedServer, Placement
from opd.teacher.transport import WIDTHS, Transport

ROLLOUT_SETTING = "rollout.gpu_memory_utilization"
TEACHER_SETTING = "teacher.gpu_memory_utilization or teacher.tensor_parallel_size"


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one run: ``trains`` says what.

    ``host_bytes`` of a machine: offloaded states, waiting scores, the copy that is saved at the end; all
    there is on a machine without GPU. ``cramped`` has a sentence for each engine whose share of a card is too
    small for its weights and the cache of one sequence.
    """

    trains: str
    devices: tuple[Device, ...]
    learner: TrainingSetup
    transport: Transport | None
    cache_tokens: int
    host_bytes: int
    cramped: tuple[str, ...] = ()


def forecast(
    config: Config,
    placement: Placement,
    models: Models,
    *,
    prompt_tokens: int,
    density: float | None = None,
    trains: str = "every weight",
) -> Forecast:
    """The forecast of a run that is placed so. ``density``: see ``read_learner``."""
    cuda = placement.cards.count > 0
    setup = read_learner(
        config,
        models.student,
        ranks=len(placement.ranks) * placement.cards.nodes,
        cuda=cuda,
        prompt_tokens=prompt_tokens,
        density=density,
    )
    teacher = models.scoring(config)
    sent = engines.scores_sent(config, models.student, teacher, cuda=cuda)
    rank = Rank(config=config, models=models, teacher=teacher, setup=setup, sent=sent)
    devices = gpu_devices(placement, rank) if cuda else process_devices(placement, rank)
    share = placement.engine_utilization * placement.cards.memory_bytes
    host = rank.saved_copy() + len(placement.ranks) * (rank.waiting() + learner.offloaded(setup))
    return Forecast(
        trains=trains,
        devices=devices,
        learner=setup,
        transport=sent.transport,
        cache_tokens=engines.cache_tokens(config, models.student, share) if share else 0,
        host_bytes=host if cuda else sum(d.peak * d.count for d in devices),
        cramped=tuple(_cramped(placement, rank)) if placement.cards.memory_bytes and cuda else (),
    )


def _cramped(placement: Placement, rank: Rank) -> Iterator[str]:
    """Engines that would not start: vLLM refuses a cache that is smaller than one sequence."""
    config, student = rank.config, rank.models.student
    element = WIDTHS[engine_dtype(config)]
    shares = {placement.engine_utilization, *_shares(placement.rollout_servers)} - {0.0}
    for share in sorted(shares):
        yield from _too_small(
            placement, rank, "a rollout engine", student, element, 1, share, ROLLOUT_SETTING
        )
    for server in placement.teachers:
        facts = rank.models.teachers[server.model]
        yield from _too_small(
            placement,
            rank,
            f"the teacher {server.model}",
            facts,
            engines.weight_bytes(config.teacher, facts, cuda=True),
            len(server.cards),
            server.gpu_memory_utilization,
            TEACHER_SETTING,
        )


def _too_small(
    placement: Placement,
    rank: Rank,
    who: str,
    facts: ModelFacts,
    element: int,
    cards: int,
    share: float,
    setting: str,
) -> Iterator[str]:
    held = share * placement.cards.memory_bytes
    needed = engines.least_share(facts, element, cards, rank.setup.work.width)
    if needed > held:
        yield (
            f"{who} gets {held / GIB:.1f} GiB of a card and needs {needed / GIB:.1f} for its weights and one "
            f"sequence: raise {setting}"
        )


def _shares(servers: tuple[PlacedServer, ...]) -> set[float]:
    return {server.gpu_memory_utilization for server in servers}


def overflows(found: Forecast, cards: Cards) -> list[str]:
    """A sentence for each card, or for a machine without GPU, that is too small; empty where all fits.

    Nothing is too small where the memory is not known.
    """
    if not cards.count:
        needed = sum(device.peak * device.count for device in found.devices)
        if not cards.memory_bytes or needed <= cards.memory_bytes:
            return []
        return [
            f"the processes need {needed / GIB:.1f} GiB and the machine has "
            f"{cards.memory_bytes / GIB:.1f} GiB"
        ]
    full = [device for device in found.devices if device.memory_bytes and device.spare < 0]
    return [*map(_overflow, full), *found.cramped]


def _overflow(device: Device) -> str:
    phase = device.worst
    largest = sorted(device.phases[phase].items(), key=lambda item: -item[1])[:3]
    terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    who = f"each of {device.name}" if device.count > 1 else device.name
    return (
        f"{who} needs {device.peak / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB in the phase {phase}, "
        f"{-device.spare / GIB:.1f} too many: {terms}"
    )
