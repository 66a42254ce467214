"""A reward beside the teacher's scores: one for each completion, and its advantage in its group."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from opd.interfaces import Teacher
from opd.types import FloatArray, Rollout, ScoredRollout, TeacherInfo

Reward = Callable[[Rollout], float]


class RewardedTeacher:
    """A ``Teacher`` that adds ``reward`` and ``advantage`` to the scores of ``teacher``.

    The group of a completion is the rollouts of its prompt in the same call.
    """

    def __init__(self, teacher: Teacher, reward: Reward, *, scale_rewards: bool) -> None:
        self._teacher = teacher
        self._reward = reward
        self._scale = scale_rewards

    def score(self, rollouts: Sequence[Rollout]) -> list[ScoredRollout]:
        """See ``Teacher``. ValueError when a reward is not a finite number."""
        scored = self._teacher.score(rollouts)
        rewards = [_finite(self._reward(rollout), rollout) for rollout in rollouts]
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
    """reward - mean(group), divided by the group's standard deviation with ``scale_rewards``.

    0 for a group of equal rewards (GRPO, arXiv 2402.03300; without scaling Dr. GRPO, arXiv
    2503.20783).
    """
    mean = math.fsum(group) / len(group)
    if not scale_rewards or len(group) < 2:
        return reward - mean
    spread = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
    return 0.0 if spread < 1e-8 else (reward - mean) / spread


def _finite(reward: float, rollout: Rollout) -> float:
    if not math.isfinite(reward):
        raise ValueError(
            f"the reward of a completion of prompt {rollout.prompt.uid} is {reward}; expected a "
            "finite number"
        )
    return float(reward)
