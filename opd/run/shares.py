"""The share of a card's memory that each engine on it takes."""

import math
from dataclasses import dataclass, replace

from opd.config.rollout import SHARED_ENGINE, ServerRolloutConfig, VllmRolloutConfig
from opd.config.schema import Config
from opd.config.serving import ALONE
from opd.config.teacher import SHARED_TEACHER, ServedTeacherConfig
from opd.run.placement import PlacedServer, Placement

MARGIN = 0.1
"""Share of a card that chosen shares leave free: CUDA contexts and the teacher's output head lie there."""
LEAST = 0.05
"""The smallest share that is chosen; with less an engine would not start."""
DIGITS = 1000
ROUNDING = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    """What an engine takes of each of its cards: as ``setting`` says, else at most ``wanted``."""

    setting: str
    cards: tuple[int, ...]
    given: float | None
    wanted: float


def with_shares(config: Config, placement: Placement, scale: float = 1.0) -> Placement:
    """The placement with the share of every engine; ``scale`` multiplies those that no setting gives.

    Raises ValueError where settings ask for more memory than a card has, or leave too little of it.
    """
    teachers = [_teacher_claim(config, placement, server) for server in placement.teachers]
    rollouts = [_rollout_claim(config, placement, server) for server in placement.rollout_servers]
    engine = _engine_claim(config, placement)
    claims = [*teachers, *rollouts, *([] if engine is None else [engine])]
    for card in range(placement.cards.count):
        _require_room(placement, card, [claim for claim in claims if card in claim.cards])

    def share(claim: _Claim) -> float:
        if claim.given is not None:
            return claim.given
        factors = [_factor(card, claims) for card in claim.cards]
        wanted = claim.wanted * scale * min(factors, default=1.0)
        return math.floor(wanted * DIGITS + ROUNDING) / DIGITS

    def shared(servers: tuple[PlacedServer, ...], claims: list[_Claim]) -> tuple[PlacedServer, ...]:
        pairs = zip(servers, claims, strict=True)
        return tuple(replace(s, gpu_memory_utilization=share(claim)) for s, claim in pairs)

    return replace(
        placement,
        engine_utilization=0.0 if engine is None else share(engine),
        teachers=shared(placement.teachers, teachers),
        rollout_servers=shared(placement.rollout_servers, rollouts),
    )


def _engine_claim(config: Config, placement: Placement) -> _Claim | None:
    """The claim of the engines inside the ranks."""
    rollout = config.rollout
    if not isinstance(rollout, VllmRolloutConfig):
        return None
    return _Claim(
        setting="rollout.gpu_memory_utilization",
        cards=tuple(placement.rank_cards),
        given=rollout.gpu_memory_utilization,
        wanted=SHARED_ENGINE,
    )


def _rollout_claim(config: Config, placement: Placement, server: PlacedServer) -> _Claim:
    assert isinstance(config.rollout, ServerRolloutConfig)
    return _Claim(
        setting="rollout.gpu_memory_utilization",
        cards=server.cards,
        given=config.rollout.gpu_memory_utilization,
        wanted=_wanted(placement, server, placement.rollout_servers, SHARED_ENGINE),
    )


def _teacher_claim(config: Config, placement: Placement, server: PlacedServer) -> _Claim:
    assert isinstance(config.teacher, ServedTeacherConfig)
    return _Claim(
        setting="teacher.gpu_memory_utilization",
        cards=server.cards,
        given=config.teacher.gpu_memory_utilization,
        wanted=_wanted(placement, server, placement.teachers, SHARED_TEACHER),
    )


def _wanted(
    placement: Placement, server: PlacedServer, kind: tuple[PlacedServer, ...], beside_ranks: float
) -> float:
    """``beside_ranks`` divided among the servers of this kind; ALONE among all where there is no rank."""
    wanted = [beside_ranks] if not server.cards else []
    for card in server.cards:
        ranks, servers = placement.on(card)
        alike = sum(card in other.cards for other in kind)
        wanted.append(beside_ranks / alike if ranks else ALONE / len(servers))
    return min(wanted)


def _factor(card: int, claims: list[_Claim]) -> float:
    """By what the chosen shares of a card are multiplied, so that they fit beside the given ones."""
    there = [claim for claim in claims if card in claim.cards]
    given = sum(claim.given for claim in there if claim.given is not None)
    wanted = sum(claim.wanted for claim in there if claim.given is None)
    return min(1.0, (1 - MARGIN - given) / wanted) if wanted else 1.0


def _require_room(placement: Placement, card: int, claims: list[_Claim]) -> None:
    """ValueError where the given shares of a card leave less than ``LEAST`` to another, or exceed 1."""
    given = [claim for claim in claims if claim.given is not None]
    wanted = [claim.wanted for claim in claims if claim.given is None]
    total = sum(claim.given for claim in claims if claim.given is not None)
    least = min(wanted, default=1.0) * _factor(card, claims)
    if total <= 1 + ROUNDING and least >= LEAST - ROUNDING:
        return
    where = f"GPU {placement.cards.identity(card)}"
    apart = (
        "give servers GPUs of their own (teacher.devices, rollout.devices, fewer launch.processes)"
    )
    if not given:
        raise ValueError(
            f"{len(claims)} engines share {where} and {least:.3f} of its memory is left to each, at least "
            f"{LEAST:g} is needed: start fewer (teacher.replicas, rollout.servers), or {apart}"
        )
    settings = ", ".join(f"{claim.setting}={claim.given:g}" for claim in given)
    found = (
        f"{where} is to give {total:g} of its memory to {len(given)} engines ({settings}), and has 1"
        if total > 1 + ROUNDING
        else f"{len(claims)} engines share {where} and {settings} leaves too little to the others"
    )
    names = " and ".join(sorted({claim.setting for claim in given}))
    raise ValueError(f"{found}: lower {names}, or {apart}")
