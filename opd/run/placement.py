"""Which card each part of a run occupies: ranks with their engines, rollout servers, teacher servers."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Cards:
    """The GPUs of a run: ``count`` on each of ``nodes`` machines, 0 on a machine without GPU.

    ``memory_bytes`` is the memory of one card, 0 where it is not known. ``ids`` are the cards' names in
    CUDA_VISIBLE_DEVICES, in the order in which CUDA numbers them; without them that is their number.
    """

    count: int
    nodes: int = 1
    memory_bytes: int = 0
    name: str = ""
    ids: tuple[str, ...] = ()

    def identity(self, card: int) -> str:
        """The name of a card in CUDA_VISIBLE_DEVICES."""
        return self.ids[card] if self.ids else str(card)

    def visible(self, cards: Sequence[int]) -> dict[str, str]:
        """The environment of a child process that sees these cards only; empty where there are none."""
        if not cards:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.identity(card) for card in cards)}


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

    @property
    def beside_teachers(self) -> list[int]:
        """The cards of which teacher servers leave something to ranks or rollout servers."""
        only_teachers = {card for server in self.teachers for card in server.cards}
        for server in self.rollout_servers:
            only_teachers -= set(server.cards)
        only_teachers -= set(self.rank_cards)
        return [card for card in range(self.cards.count) if card not in only_teachers]

    @property
    def rank_cards(self) -> list[int]:
        """The cards of the ranks, in the order of the ranks; none on a CPU."""
        return [card for card in self.ranks if card is not None]
