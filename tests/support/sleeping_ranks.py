"""One rank that scores at stub teachers and then learns from it, and logs when it does what.

    python -m tests.support.sleeping_ranks OUT STEPS WHERE...

WHERE is the addresses of one teacher, or a pool as a=ADDRESSES;b=ADDRESSES; one after the other is used.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

from opd.assembly.served_teacher import put_to_sleep, served_clients
from opd.config.teacher import PoolTeacherConfig, ServedTeacherConfig, ServerTeacherConfig
from opd.tracking.console import SilentProgress
from opd.train.student import TeacherHeads
from opd.types import Rollout, ScoreRequest
from opd.world import World, join_world
from tests.support.stub_teacher import STUDENT, log_event, numbered, of_teacher

LEARN_S = 0.2
REQUESTS = [ScoreRequest(top_k=3), ScoreRequest(full=True)]


def share(step: int, rank: int) -> list[Rollout]:
    """Rank 1 has far more to score than rank 0."""
    count, length = (2, 50) if rank == 0 else (12, 400)
    first = 1000 * step + 100 * rank
    return [of_teacher(numbered(first + i, length), "ab"[i % 2]) for i in range(count)]


def teacher_config(where: str) -> ServedTeacherConfig:
    """``where``: addresses, or the members of a pool."""
    if ";" not in where:
        return ServerTeacherConfig(url=where, sleep=True)
    members = dict(member.split("=", 1) for member in where.split(";"))
    return PoolTeacherConfig(members=members, sleep=True)


def main(out: Path, steps: int, places: list[str]) -> None:
    """Score and learn at each of ``places``; collective."""
    world = join_world()
    for number, where in enumerate(places):
        folder = out / f"{number}"
        if world.is_main:
            folder.mkdir()
            log_event("place")
        world.barrier()
        work(folder, steps, where, world)
        world.barrier()


def work(out: Path, steps: int, where: str, world: World) -> None:
    """Score and learn, and save the scores; collective."""
    config = teacher_config(where)
    clients = served_clients(config, STUDENT, REQUESTS, SilentProgress())
    heads = TeacherHeads(clients[1], 2, world.device)
    _, teacher = put_to_sleep(config, clients, heads, world)
    for step in range(steps):
        log_event(f"generate {world.rank}")
        time.sleep(LEARN_S)
        scored = teacher.score(share(step, world.rank))
        log_event(f"learn {world.rank}")
        time.sleep(LEARN_S)
        logps = [
            torch.log_softmax(
                torch.from_numpy(s.hidden) @ heads(s.rollout.prompt.teacher).T, dim=-1
            )
            for s in scored
        ]
        log_event(f"learned {world.rank}")
        np.savez(out / f"{step}_{world.rank}.npz", *[each.numpy() for each in logps])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush()
    os._exit(0)  # as a worker of a run leaves: after gloo an interpreter may abort at its exit
