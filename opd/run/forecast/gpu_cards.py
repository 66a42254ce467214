"""What the GPUs of a placement hold in each phase."""

from dataclasses import replace

from opd.config.rollout import VllmRolloutConfig
from opd.config.schema import Config
from opd.config.teacher import ServedTeacherConfig
from opd.run.forecast import engines
from opd.run.forecast.gpus import CONTEXT_BYTES, SLEEPING_ENGINE_BYTES
from opd.run.forecast.learner import Bytes, added
from opd.run.forecast.rank import Device, Phase, Rank, largest
from opd.run.forecast.setup import TrainingSetup
from opd.run.placement import PlacedServer, Placement


def gpu_devices(placement: Placement, rank: Rank) -> tuple[Device, ...]:
    """One device for each group of cards that hold the same."""
    found: dict[tuple[object, ...], tuple[Device, list[int]]] = {}
    for card in range(placement.cards.count):
        device = _gpu(placement, rank, card)
        key = (device.holds, tuple((p, tuple(t.items())) for p, t in device.phases.items()))
        found.setdefault(key, (device, []))[1].append(card)
    return tuple(
        replace(device, name=_card_names(cards), count=len(cards))
        for device, cards in found.values()
    )


def _gpu(placement: Placement, rank: Rank, card: int) -> Device:
    ranks, servers = placement.on(card)
    memory = placement.cards.memory_bytes
    phases: dict[Phase, Bytes] = {phase: {} for phase in Phase}
    moments: dict[str, int] = {}
    if ranks:
        moments, own = _rank_phases(rank, placement.engine_utilization * memory)
        phases = {phase: dict(terms) for phase, terms in own.items()}
    for server in servers:
        is_teacher = server in placement.teachers
        for phase in Phase:
            terms = _server(rank, server, memory, card, is_teacher=is_teacher, phase=phase)
            for name, size in terms.items():
                phases[phase][name] = phases[phase].get(name, 0) + size
    names = ["a rank" for _ in ranks]
    names += [
        f"{'teacher' if s in placement.teachers else 'rollout server of'} {s.model}"
        + (f" (1 of {len(s.cards)})" if len(s.cards) > 1 else "")
        for s in servers
    ]
    return Device(
        name="",
        holds=tuple(names),
        phases={phase: {n: b for n, b in terms.items() if b} for phase, terms in phases.items()},
        memory_bytes=memory,
        moments=moments,
    )


def _rank_phases(rank: Rank, share: float) -> tuple[dict[str, int], dict[Phase, Bytes]]:
    """A rank with its engine on a card.

    The engine starts first and then sleeps at level 2: it wakes its weights in the sync, its cache in the
    rollout. The learner is built while it sleeps, optimizer states included.
    """
    config, setup = rank.config, rank.setup
    resident = rank.resident()
    moments, learn = largest(rank.learn())
    own = rank.models.student
    local = engines.local_teacher(config, own if rank.teacher is None else rank.teacher, cuda=True)
    kept = engines.process_engine(config, own)
    generating = engines.generation(config, own, setup.work.width, setup.work.sequences)
    awake: Bytes = {"engine": int(share)}
    asleep, weights = awake, awake
    if isinstance(config.rollout, VllmRolloutConfig):
        if config.rollout.enable_sleep_mode:
            asleep = {"engine": SLEEPING_ENGINE_BYTES}
            weights = {"engine": engines.engine_weights(config, own) + SLEEPING_ENGINE_BYTES}
    else:
        awake = asleep = weights = kept
    context: Bytes = {"CUDA context": CONTEXT_BYTES}
    always = added(context | resident, local)
    flattening = max(0, 2 * resident["weights"] - sum(resident.values()))
    built = always | asleep | {"flattening": flattening if setup.zero in (1, 2) else 0}
    start = max(context | awake, built, key=lambda terms: sum(terms.values()))
    scoring = {}
    if local and rank.teacher is not None:
        element = engines.weight_bytes(config.teacher, rank.teacher, cuda=True)
        scoring = {
            "scores": engines.scoring_head(rank.teacher, element)["scores"]
            + engines.forward_pass(rank.teacher, element, config.teacher.max_num_batched_tokens)
        }
    return moments, {
        Phase.start: start,
        Phase.rollout: always | awake | {"generation": generating},
        Phase.score: always | asleep | scoring,
        Phase.learn: added(always | asleep, learn),
        Phase.sync: always | weights | {"gathered weights": _gathered(setup)},
        Phase.save: always | asleep | {"gathered weights": _gathered(setup)},
    }


def _gathered(setup: TrainingSetup) -> int:
    """The largest layer or embedding in the engine's number format; under ZeRO-3 the same gathered."""
    largest = max(setup.facts.layer, setup.facts.embedding)
    return 2 * largest * (2 if setup.zero == 3 else 1)


def _server(
    rank: Rank, server: PlacedServer, memory: int, card: int, *, is_teacher: bool, phase: Phase
) -> Bytes:
    """A server's share of a card: its engine, its context, and a teacher's head on the first card."""
    share = int(server.gpu_memory_utilization * memory)
    if not is_teacher:
        return {"rollout server": share + CONTEXT_BYTES}
    facts = rank.models.teachers[server.model]
    sleeps = teacher_sleeps(rank.config) and phase not in (Phase.start, Phase.score)
    terms = {
        "teacher": SLEEPING_ENGINE_BYTES if sleeps else share,
        "CUDA context": CONTEXT_BYTES,
    }
    if card == server.cards[0]:
        element = engines.weight_bytes(rank.config.teacher, facts, cuda=True)
        head = engines.scoring_head(facts, element)
        terms["teacher's head (server)"] = head["teacher's head"]
        terms["scores"] = head["scores"] if phase == Phase.score else 0
    return terms


def teacher_sleeps(config: Config) -> bool:
    """Whether teacher servers free their memory while nothing is scored."""
    return isinstance(config.teacher, ServedTeacherConfig) and config.teacher.sleep


def _card_names(cards: list[int]) -> str:
    """GPU 0, GPUs 1-7, GPUs 0, 2."""
    if len(cards) == 1:
        return f"GPU {cards[0]}"
    if cards == list(range(cards[0], cards[-1] + 1)):
        return f"GPUs {cards[0]}-{cards[-1]}"
    return f"GPUs {', '.join(map(str, cards))}"
