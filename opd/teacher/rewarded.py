"""A reward beside the teacher's scores: one for each completion, and its advantage in its group."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from opd.faults import RunError
from opd.interfaces import Teacher
from opd.types import FloatArray, Rollout, ScoredRollout, TeacherInfo

Reward = Callable[[Sequence[Rollout]], Sequence[float]]
"""rollouts [B] -> rewards [B]"""
STD_EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does; it bounds an advantage by 1e4 times the distance."""


class RewardedTeacher:
    """A ``Teacher`` that adds ``reward`` and ``advantage`` to the scores of ``teacher``.

    The group of a completion is the rollouts of its prompt in the same call.
    """

    def __init__(self, teacher: Teacher, reward: Reward, *, scale_rewards: bool) -> None:
        self._teacher = teacher
        self._reward = reward
        self._scale = scale_rewards

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``. RunError with the prompt's uid when a reward is not a finite number."""
        scored = self._teacher.score(rollouts)
        rewards = _finite_rewards(self._reward, rollouts)
        groups: dict[str, list[float]] = {}
        for rollout, reward in zip(rollouts, rewards, strict=True):
            groups.setdefault(rollout.prompt.uid, []).append(reward)
        return [
            replace(
                scored_rollout,
                reward=reward,
                advantage=advantage(
                    reward, groups[scored_rollout.rollout.prompt.uid], scale_rewards=self._scale
                ),
            )
            for scored_rollout, reward in zip(scored, rewards, strict=True)
        ]

    def info(self) -> TeacherInfo:
        """See ``Teacher``."""
        return self._teacher.info()

    def head(self, name: str | None = None) -> FloatArray:
        """See ``Teacher``."""
        return self._teacher.head(name)


def advantage(reward: float, group: Sequence[float], *, scale_rewards: bool) -> float:
    """reward - mean(group), with ``scale_rewards`` divided by the group's standard deviation + 1e-4.

    The standard deviation is that of a sample (divisor n - 1), and 0 for a group of one. The
    advantage is exactly 0 in a group of equal rewards, and almost 0 in a group whose rewards differ
    by rounding only (GRPO, arXiv 2402.03300; without scaling Dr. GRPO, arXiv 2503.20783; the
    constant is TRL's).
    """
    if min(group) == max(group):
        return 0.0
    mean = math.fsum(group) / len(group)
    if not scale_rewards:
        return reward - mean
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
    return (reward - mean) / (spread + STD_EPSILON)


def _finite_rewards(function: Reward, rollouts: Sequence[Rollout]) -> list[float]:
    try:
        rewards = function(rollouts)
    except ValueError as error:
        raise RunError(str(error)) from error
    for rollout, reward in zip(rollouts, rewards, strict=True):
        if not math.isfinite(reward):
            raise RunError(
                f"the reward of a completion of prompt {rollout.prompt.uid} is {reward}; expected a "
                "finite number"
            )
    return [float(reward) for reward in rewards]
