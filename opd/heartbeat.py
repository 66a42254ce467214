"""What a rank is doing, in a small file that others read while it runs: signs of life and of progress."""

import json
import os
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from opd.phases import RunPhase

BEAT_S = 1.0
RECORD_BYTES = 512
"""A record is written over the former one and is always as long, so that a reader finds one of them."""
WAITING_FILES = ("distributed_c10d.py", "deepspeed/comm/comm.py", "deepspeed/comm/torch.py")
"""Python files in which a main thread waits for other ranks."""
LOOKED_AT_FRAMES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One record. ``moves`` counts what the main thread has finished, ``beats`` the signs of life.

    ``waits``: the main thread is inside a collective of torch or DeepSpeed, as far as Python can see.
    """

    rank: int
    host: str
    pid: int
    phase: RunPhase = RunPhase.start
    step: int = 0
    moves: int = 0
    beats: int = 0
    waits: bool = False


def beat_path(folder: Path, rank: int) -> Path:
    """The file of a rank in a run folder."""
    return folder / "logs" / "beats" / f"rank_{rank}"


def read_beat(folder: Path, rank: int) -> Beat | None:
    """The last record of a rank; None before the first one."""
    try:
        found = json.loads(beat_path(folder, rank).read_text())
        return Beat(**(found | {"phase": RunPhase(found["phase"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None


class Heartbeat:
    """Writes the records of this rank: ``enter`` and ``move`` from the main thread, beats by a thread.

    The thread needs the interpreter lock, so a process that is stopped, or that hangs inside a library
    which holds the lock, does not beat; a main thread that hangs beside it does not move.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        path = beat_path(folder, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        self._lock = threading.Lock()
        self._beat = Beat(rank=rank, host=socket.gethostname(), pid=os.getpid())
        self._main = threading.main_thread().ident
        self._write()
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()

    def enter(self, phase: RunPhase, step: int) -> None:
        """A phase of a step begins."""
        with self._lock:
            self._beat = replace(self._beat, phase=phase, step=step, moves=self._beat.moves + 1)
            self._write()

    def move(self) -> None:
        """Something was finished inside the phase; it is written with the next beat."""
        with self._lock:
            self._beat = replace(self._beat, moves=self._beat.moves + 1)

    def _run(self) -> None:
        pause = threading.Event()
        while not pause.wait(BEAT_S):
            waits = self._main is not None and _waits_for_others(self._main)
            with self._lock:
                self._beat = replace(self._beat, beats=self._beat.beats + 1, waits=waits)
                self._write()

    def _write(self) -> None:
        record = json.dumps(asdict(self._beat)).encode()
        with suppress(OSError):  # a full disk is for whoever writes something that counts
            os.pwrite(self._file, record.ljust(RECORD_BYTES), 0)


def _waits_for_others(thread: int) -> bool:
    frame = sys._current_frames().get(thread)
    for _ in range(LOOKED_AT_FRAMES):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith(WAITING_FILES):
            return True
        frame = frame.f_back
    return False
