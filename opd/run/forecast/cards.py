"""The forecast of a run, and the sentences about cards that are too small for it."""

from dataclasses import dataclass

from opd.config.schema import Config
from opd.run.forecast import engines, learner
from opd.run.forecast.gpu_cards import gpu_devices
from opd.run.forecast.gpus import GIB
from opd.run.forecast.processes import process_devices
from opd.run.forecast.rank import Device, Models, Rank
from opd.run.forecast.setup import Learner, read_learner
from opd.run.placement import Cards, Placement
from opd.teacher.transport import Transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of one run: ``trains`` says what.

    ``host_bytes`` of a machine: offloaded states, waiting scores, the copy that is saved at the end; all
    there is on a machine without GPU.
    """

    trains: str
    devices: tuple[Device, ...]
    learner: Learner
    transport: Transport | None
    cache_tokens: int
    host_bytes: int
    notes: tuple[str, ...] = ()


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
    waiting = rank.waiting() * len(placement.ranks)
    offloaded = learner.offloaded(setup) * len(placement.ranks)
    return Forecast(
        trains=trains,
        devices=devices,
        learner=setup,
        transport=sent.transport,
        cache_tokens=engines.cache_tokens(config, models.student, share) if share else 0,
        host_bytes=waiting + offloaded if cuda else sum(d.peak * d.count for d in devices),
    )


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
    return [
        _overflow(device) for device in found.devices if device.memory_bytes and device.spare < 0
    ]


def _overflow(device: Device) -> str:
    phase = device.worst
    largest = sorted(device.phases[phase].items(), key=lambda item: -item[1])[:3]
    terms = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    return (
        f"{device.name} needs {device.peak / GIB:.1f} of {device.memory_bytes / GIB:.1f} GiB in the phase "
        f"{phase}, {-device.spare / GIB:.1f} too many: {terms}"
    )
