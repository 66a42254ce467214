"""The phases of a run."""

from enum import StrEnum


class RunPhase(StrEnum):
    """What a rank is doing, in the order of a step: of two ranks the one in the earlier phase is behind."""

    start = "start"
    rollout = "rollout"
    teacher = "teacher"
    learn = "learn"
    sync = "sync"
    evaluate = "evaluate"
    checkpoint = "checkpoint"
    done = "done"
