"""Threshold a list of rollouts into requests, send a few at once, and show how many are answered."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from opd.interfaces import Progress
from opd.types import Rollout, ScoredRollout


def by_tokens(
    rollouts: Sequence[Rollout], tokens: int, *, targets: int | None = None
) -> list[list[Rollout]]:
    """Neighbours in groups of at most ``tokens`` tokens and ``targets`` completion tokens.

    Tokens are those that the teacher reads, its own prompt included. A rollout that is longer than
    that gets a group of its own. Order is kept.
    """
    groups: list[list[Rollout]] = []
    room = room_targets = 0
    limit = tokens if targets is None else targets
    for rollout in rollouts:
        length, asked = len(rollout.teacher_sequence), len(rollout.token_ids)
        if groups and length <= room and asked <= room_targets:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
            room, room_targets = tokens, limit
        room, room_targets = room - length, room_targets - asked
    return groups


def bar(
    progress: Progress | None, rollouts: Sequence[Rollout]
) -> AbstractContextManager[Callable[[int], None]]:
    """The bar of one ``score`` call; silent without ``progress``."""
    if progress is None:
        return nullcontext(lambda _: None)
    return progress.track("teacher", len(rollouts))


def at_once(
    score: Callable[[Sequence[Rollout]], list[ScoredRollout]],
    groups: Sequence[Sequence[Rollout]],
    *,
    most: int,
    advance: Callable[[int], None],
) -> list[ScoredRollout]:
    """``score`` of every group, ``most`` under way at a time, in the order given.

    The first group that fails ends the rest; ``advance`` is told of rollouts as groups come back.
    """
    scored: list[ScoredRollout] = []
    with ThreadPoolExecutor(most) as pool:
        waiting = [pool.submit(score, group) for group in groups]
        try:
            for future in waiting:
                part = future.result()
                scored += part
                advance(len(part))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return scored
