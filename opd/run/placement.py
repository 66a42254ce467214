"""Which card each part of a run occupies: ranks with their engines, rollout servers, teacher servers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The GPUs of a run: ``count`` on each of ``nodes`` machines, 0 on a machine without GPU.

    ``memory_bytes`` is the memory of one card, 0 where it is not known.
    """

    count: int
    nodes: int = 1
    memory_bytes: int = 0
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedServer:
    """A server that the run starts: its model, and its cards among the visible ones (none on a CPU).

    It splits the model over ``len(cards)`` cards, and its engine takes ``gpu_memory_utilization`` of the
    memory of each.
    """

    model: str
    cards: tuple[int, ...]
    gpu_memory_utilization: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Who sits where on one node.

    ``ranks`` has the card of each training process (None on a CPU). ``engine_utilization`` is the share of
    each rank's card that its own rollout engine takes; 0 without such an engine.
    """

    cards: Cards
    ranks: tuple[int | None, ...]
    engine_utilization: float
    rollout_servers: tuple[PlacedServer, ...] = ()
    teachers: tuple[PlacedServer, ...] = ()

    def on(self, card: int) -> tuple[list[int], list[PlacedServer]]:
        """The ranks and the servers of a card."""
        ranks = [rank for rank, own in enumerate(self.ranks) if own == card]
        servers = [s for s in (*self.teachers, *self.rollout_servers) if card in s.cards]
        return ranks, servers
