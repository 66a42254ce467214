"""Split rollouts into requests, score a few at a time, and show the progress."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

from opd.interfaces import Progress
from opd.types import Rollout, ScoredRollout


def group_by_tokens(
    rollouts: Sequence[Rollout], tokens: int, *, targets: int | None = None
) -> list[list[Rollout]]:
    """Neighbours in groups of at most ``tokens`` tokens and ``targets`` completion tokens.

    Tokens are those that the teacher reads, its own prompt included. A longer rollout gets a group of
    its own. The order is kept.
    """
    groups: list[list[Rollout]] = []
    room = room_targets = 0
    limit = tokens if targets is None else targets
    for rollout in rollouts:
        length, completion = len(rollout.teacher_sequence), len(rollout.token_ids)
        if groups and length <= room and completion <= room_targets:
            groups[-1].append(rollout)
        else:
            groups.append([rollout])
            room, room_targets = tokens, limit
        room, room_targets = room - length, room_targets - completion
    return groups


def progress_bar(
    progress: Progress | None, rollouts: Sequence[Rollout]
) -> AbstractContextManager[Callable[[int], None]]:
    """The bar of one ``score`` call; none without ``progress``."""
    if progress is None:
        return nullcontext(lambda _: None)
    return progress.track("teacher", len(rollouts))


def score_concurrently(
    score: Callable[[Sequence[Rollout]], list[ScoredRollout]],
    groups: Sequence[Sequence[Rollout]],
    *,
    max_concurrent: int,
    advance: Callable[[int], None],
) -> list[ScoredRollout]:
    """``score`` of every group, ``max_concurrent`` at a time, in the order given.

    The first failure cancels the groups not yet started; ``advance`` counts rollouts as groups finish.
    """
    scored: list[ScoredRollout] = []
    with ThreadPoolExecutor(max_concurrent) as pool:
        futures = [pool.submit(score, group) for group in groups]
        try:
            for future in futures:
                group_scored = future.result()
                scored += group_scored
                advance(len(group_scored))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return scored
