"""Which rank of a run hangs, and in which phase, by the heartbeats of all ranks."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from opd.config.launch import DeadlineConfig
from opd.faults import RunError
from opd.heartbeat import Beat, read_beat
from opd.phases import RunPhase
from opd.run.status import FAILED, MESSAGE_MARK

SILENT_S = 10.0
"""A rank that has given no sign of life for so long is stopped, or nearly so."""
UNWATCHED_S = 5.0
"""If so much time passes between two looks, the watcher itself was stopped, and it is not counted."""
OTHERS_PATIENCE_S = 10.0
"""Without our launcher rank 0 looks; the others do so later, in case that it is rank 0 that hangs."""
LOOK_S = 1.0
ORDER = list(RunPhase)


class RankHung(RunError):
    """A rank finished nothing before the deadline of its phase."""


@dataclass(slots=True)
class _Seen:
    """What is known of a rank, and when it changed last, by the clock of the watcher."""

    beat: Beat
    moved_at: float
    beat_at: float
    has_beaten: bool = False


class HangWatch:
    """Looks at the heartbeats in a run folder; ``check`` often, since time between two looks counts.

    Times are taken from the changes that this watcher sees, so that clocks of other machines do not
    matter and records of an earlier run are those of ranks that have not started. A rank that waits for
    others is not late: only ranks in the earliest phase of the earliest step are, and among those the ones
    that do not wait inside a collective. ``patience`` seconds are added to every deadline.
    """

    def __init__(
        self,
        folder: Path,
        ranks: int,
        deadlines: DeadlineConfig,
        *,
        patience: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder, self._deadlines, self._patience = folder, deadlines, patience
        self._clock = clock
        now = self._looked_at = clock()
        self._seen = [_Seen(_unknown(rank), now, now) for rank in range(ranks)]
        self._former = [read_beat(folder, rank) for rank in range(ranks)]

    def phase(self, rank: int) -> tuple[RunPhase, int]:
        """The last known phase of a rank, and its step."""
        self._look(rank, self._clock())
        beat = self._seen[rank].beat
        return beat.phase, beat.step

    def forgive(self) -> None:
        """The time since the last look does not count: what the ranks need is being started."""
        now = self._clock()
        for seen in self._seen:
            seen.moved_at += now - self._looked_at
            seen.beat_at += now - self._looked_at
        self._looked_at = now

    def check(self) -> None:
        """Raise RankHung with one sentence when a rank hangs."""
        now = self._clock()
        if now - self._looked_at > UNWATCHED_S:
            self.forgive()
        self._looked_at = now
        for rank in range(len(self._seen)):
            self._look(rank, now)
        late = self._late(now)
        if late:
            raise RankHung(" and ".join(self._describe(seen, now) for seen in late))

    def _look(self, rank: int, now: float) -> None:
        seen, beat = self._seen[rank], read_beat(self._folder, rank)
        if beat is None or beat == self._former[rank]:
            return
        self._former[rank] = None
        if not seen.has_beaten or beat.beats != seen.beat.beats:
            seen.beat_at = now
        if not seen.has_beaten or (beat.moves, beat.pid) != (seen.beat.moves, seen.beat.pid):
            seen.moved_at = now
        seen.beat, seen.has_beaten = beat, True

    def _late(self, now: float) -> list[_Seen]:
        position = min(_position(seen.beat) for seen in self._seen)
        behind = [seen for seen in self._seen if _position(seen.beat) == position]
        working = [s for s in behind if not s.beat.waits or self._is_silent(s, now)]
        late = [seen for seen in (working or behind) if self._is_late(seen, now)]
        return [seen for seen in late if self._is_silent(seen, now)] or late

    def _is_silent(self, seen: _Seen, now: float) -> bool:
        return seen.has_beaten and now - seen.beat_at > SILENT_S

    def _is_late(self, seen: _Seen, now: float) -> bool:
        deadline = self._deadline(seen)
        return deadline > 0 and now - seen.moved_at > deadline + self._patience

    def _deadline(self, seen: _Seen) -> float:
        allowed = self._deadlines
        return {
            RunPhase.start: allowed.start,
            RunPhase.rollout: allowed.rollout,
            RunPhase.teacher: allowed.teacher,
            RunPhase.learn: allowed.learn,
            RunPhase.sync: allowed.sync,
            RunPhase.evaluate: allowed.evaluate,
            RunPhase.checkpoint: allowed.checkpoint,
            RunPhase.done: 0.0,
        }[seen.beat.phase]

    def _describe(self, seen: _Seen, now: float) -> str:
        beat = seen.beat
        place = f" on {beat.host}" if beat.host else ""
        where = beat.phase if beat.phase == RunPhase.start else f"{beat.phase} of step {beat.step}"
        why = "is stopped or hangs" if self._is_silent(seen, now) else "hangs"
        return (
            f"rank {beat.rank}{place} {why}: in phase {where} it finished nothing for "
            f"{now - seen.moved_at:.0f} s (launch.deadlines.{beat.phase}={self._deadline(seen):g})"
        )


def leave_on_hang(folder: Path, rank: int, ranks: int, deadlines: DeadlineConfig) -> None:
    """End this process from a thread when a rank of the run hangs, itself or another one.

    For runs that another launcher started, which ends the other ranks when one has failed. The ranks read
    each other's heartbeats in the run folder, which all machines share.
    """
    watch = HangWatch(folder, ranks, deadlines, patience=OTHERS_PATIENCE_S if rank else 0.0)

    def look() -> None:
        pause = threading.Event()
        while not pause.wait(LOOK_S):
            try:
                watch.check()
            except RankHung as error:
                print(f"{MESSAGE_MARK}{error}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback()
                os._exit(FAILED)

    threading.Thread(target=look, daemon=True, name="hang watch").start()


def _unknown(rank: int) -> Beat:
    return Beat(rank=rank, host="", pid=0)


def _position(beat: Beat) -> tuple[int, int]:
    """Where a rank is. Phases that come before a first step count as before it."""
    if beat.phase == RunPhase.done:
        return (1 << 62, 0)
    return (beat.step, ORDER.index(beat.phase))
