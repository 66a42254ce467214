"""Places a run on its cards: which rank and which server sits where, from settings and GPUs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from opd.config.launch import LaunchEngine, count_processes
from opd.config.rollout import RolloutConfig, ServerRolloutConfig, VllmRolloutConfig
from opd.config.schema import Config
from opd.config.teacher import ServedTeacherConfig, TeacherBackend
from opd.run.placement import Cards, PlacedServer, Placement
from opd.run.shares import with_shares
from opd.teacher.connect import started_models
from opd.teacher.model_info import LayerShape, read_layer_shape

ReadShape = Callable[[str], LayerShape | None]
"""The layers of a model as its config describes them; None where that is not known."""
SCALES = (1.0, 0.8, 0.6, 0.4)
"""Of the usual shares of memory, which are tried in this order."""
Overflows = Callable[[Placement], list[str]]
"""A sentence for each card and phase in which a placement needs more memory than the card has."""


def place(
    config: Config,
    cards: Cards,
    fits: Overflows | None = None,
    *,
    read_shape: ReadShape | None = None,
) -> Placement:
    """The first placement of which ``fits`` names no card that overflows.

    Explicit settings are kept. Servers get cards that no rank uses, where there are some, and split their
    models over these; else they share cards with ranks, each on one card first and on more if need be.
    Shares of memory that no setting gives are lowered before a model is split over more cards.
    Raises ValueError with the setting that would help where the settings contradict each other or the
    cards, and where nothing fits.
    """
    processes = count_processes(config)
    if not cards.count:
        return with_shares(config, _without_cards(config, cards, processes))
    if processes > cards.count * cards.nodes:
        raise ValueError(
            f"launch.processes={processes} needs as many GPUs and {cards.count * cards.nodes} can be seen: "
            f"set launch.processes={cards.count * cards.nodes}, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
    overflows: list[str] = []
    for candidate in _candidates(config, cards, read_shape or read_known_shape):
        for scale in SCALES:
            placement = with_shares(config, candidate, scale)
            found = [] if fits is None else fits(placement)
            if not found:
                return placement
            overflows = overflows or found
    raise ValueError(
        f"{'; '.join(overflows)}: {_remedies(config)}; launch.memory_check=false tries it all the same"
    )


def choose_processes(config: Config, cards: Cards) -> int:
    """The number that launch.processes=auto is on these cards.

    One for each card that no setting gives to a server (for each card, where servers have all of them), as
    many as get a prompt; launch.cpu_processes without cards.
    """
    if config.launch.engine == LaunchEngine.torch:
        return 1
    most = config.launch.cpu_processes
    if cards.count:
        teachers, rollouts = named_cards(config, cards)
        most = (cards.count - len({*teachers, *rollouts}) or cards.count) * cards.nodes
    return min(most, config.train.prompts_per_step)


def read_known_shape(model: str) -> LayerShape | None:
    """The shape of a model's layers; None for one that cannot be read, which other checks report."""
    try:
        return read_layer_shape(model)
    except (OSError, ValueError):
        return None


def named_cards(config: Config, cards: Cards) -> tuple[list[int], list[int]]:
    """The cards that teacher.devices and rollout.devices name for servers that the run starts.

    Raises ValueError for one that cannot be seen.
    """
    teachers: list[int] = []
    rollouts: list[int] = []
    teacher, rollout = config.teacher, config.rollout
    if isinstance(teacher, ServedTeacherConfig) and teacher.devices and started_models(teacher):
        teachers = _numbers("teacher.devices", teacher.devices, cards)
    if isinstance(rollout, ServerRolloutConfig) and rollout.devices and not rollout.urls:
        rollouts = _numbers("rollout.devices", rollout.devices, cards)
    return teachers, rollouts


def _numbers(setting: str, devices: str, cards: Cards) -> list[int]:
    known = {cards.identity(card): card for card in range(cards.count)}
    names = [part.strip() for part in devices.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(
                f"{setting}={devices} names {name or 'nothing'}, and the visible GPUs are "
                f"{', '.join(known)}: name some of these, or make more visible (CUDA_VISIBLE_DEVICES)"
            )
        if names.count(name) > 1:
            raise ValueError(f"{setting}={devices} names GPU {name} twice: name each once")
    return [known[name] for name in names]


def _without_cards(config: Config, cards: Cards, processes: int) -> Placement:
    """Ranks and servers, without cards and shares."""
    rollout: RolloutConfig = config.rollout
    servers = 0
    if isinstance(rollout, ServerRolloutConfig) and not rollout.urls:
        servers = rollout.servers
    return Placement(
        cards=cards,
        ranks=(None,) * processes,
        engine_utilization=0.0,
        rollout_servers=(_server(config.student.model),) * servers,
        teachers=tuple(map(_server, started_models(config.teacher))),
    )


def _server(model: str) -> PlacedServer:
    return PlacedServer(model=model, cards=(), gpu_memory_utilization=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """The cards on which servers may be; ``shared``: no card is free of ranks and of named servers."""

    teachers: list[int]
    rollouts: list[int]
    shared: bool


def _candidates(config: Config, cards: Cards, read_shape: ReadShape) -> Iterator[Placement]:
    """The placements to try, without shares."""
    teachers, rollouts = named_cards(config, cards)
    every, named = range(cards.count), {*teachers, *rollouts}
    processes = count_processes(config) // cards.nodes
    ranks = sorted(sorted(every, key=lambda card: (card in named, card))[:processes])
    bare = replace(_without_cards(config, cards, processes), ranks=tuple(ranks))
    idle = [card for card in every if card not in named and card not in ranks]
    others = idle or [card for card in every if card not in named] or list(every)
    if not rollouts:
        rollouts = others if len(bare.rollout_servers) <= len(others) else list(every)
    _require_one_engine_each(config, len(bare.rollout_servers), rollouts)
    room = _Room(teachers=teachers or others, rollouts=rollouts, shared=not (teachers or idle))
    shapes = {server.model: read_shape(server.model) for server in bare.teachers}
    tried: set[tuple[int, ...]] = set()
    for most in _splits(bare, len(teachers), len(idle)):
        widths = tuple(
            _width(config, server.model, shapes[server.model], most, room)
            for server in bare.teachers
        )
        if widths not in tried:
            tried.add(widths)
            yield _seated(bare, room, widths)


def _splits(bare: Placement, named: int, idle: int) -> Sequence[int]:
    """The most cards for a teacher server, to be tried in turn: 1, 2, ... where it shares them with ranks."""
    if not (named or idle):
        return range(1, bare.cards.count + 1)
    own = named or idle - len(bare.rollout_servers)
    return [max(1, own // max(1, len(bare.teachers)))]


def _width(config: Config, model: str, shape: LayerShape | None, most: int, room: _Room) -> int:
    """Over how many cards a teacher server is split: as set, else over at most ``most``."""
    teacher = config.teacher
    assert isinstance(teacher, ServedTeacherConfig)
    size, there = teacher.tensor_parallel_size, len(room.teachers)
    if size is None:
        if shape is None or teacher.backend == TeacherBackend.torch:
            return 1
        return max((n for n in range(1, most + 1) if shape.divides(n)), default=1)
    if shape is not None:
        shape.require(model, size)
    if size > there:
        found = f"{there} can be seen" if room.shared else f"{there} are free of ranks"
        if teacher.devices:
            found = f"teacher.devices={teacher.devices} names {there}"
        raise ValueError(
            f"teacher.tensor_parallel_size={size} needs as many GPUs for the teacher and {found}: lower it, "
            "or give the teacher more (teacher.devices, fewer launch.processes)"
        )
    return size


def _require_one_engine_each(config: Config, servers: int, cards: list[int]) -> None:
    if servers > len(cards):
        raise ValueError(
            f"rollout.servers={servers} would put two engines on one GPU, there are {len(cards)} for them: "
            f"set rollout.servers={len(cards)}, or name more GPUs (rollout.devices, CUDA_VISIBLE_DEVICES)"
        )


def _seated(bare: Placement, room: _Room, widths: tuple[int, ...]) -> Placement:
    """Each server on those of its cards that have the fewest servers so far."""
    load = dict.fromkeys(range(bare.cards.count), 0)

    def take(cards: list[int], width: int) -> tuple[int, ...]:
        chosen = sorted(cards, key=lambda card: (load[card], cards.index(card)))[:width]
        for card in chosen:
            load[card] += 1
        return tuple(sorted(chosen, key=cards.index))

    teachers = [
        replace(server, cards=take(room.teachers, width))
        for server, width in zip(bare.teachers, widths, strict=True)
    ]
    engines = take(room.rollouts, len(bare.rollout_servers))
    rollouts = [
        replace(server, cards=(card,))
        for server, card in zip(bare.rollout_servers, engines, strict=True)
    ]
    return replace(bare, teachers=tuple(teachers), rollout_servers=tuple(rollouts))


def _remedies(config: Config) -> str:
    """What can be set where no placement fits."""
    teacher, processes = config.teacher, count_processes(config)
    remedies = []
    if started_models(teacher) and isinstance(teacher, ServedTeacherConfig):
        if processes > 1 and teacher.devices is None:
            remedies.append(
                f"leave GPUs to the teacher (launch.processes={processes - 1} or fewer)"
            )
        if teacher.tensor_parallel_size is not None:
            remedies.append("raise teacher.tensor_parallel_size")
        if teacher.gpu_memory_utilization is not None:
            remedies.append("lower teacher.gpu_memory_utilization")
        if not teacher.sleep:
            remedies.append("teacher.sleep=true")
    if isinstance(config.rollout, VllmRolloutConfig) and config.rollout.gpu_memory_utilization:
        remedies.append("lower rollout.gpu_memory_utilization")
    if config.zero < 3 and processes > 1:
        remedies.append("zero=3")
    if not config.train.gradient_checkpointing:
        remedies.append("train.gradient_checkpointing=true")
    remedies.append("a smaller train.max_tokens_per_micro_batch")
    remedies.append("adapter=lora")
    return ", ".join(remedies[:-1]) + f" or {remedies[-1]}"
