"""The ranks of a run as child processes: start them, watch them, end them."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from opd.faults import RunError
from opd.heartbeat import beat_path
from opd.phases import RunPhase
from opd.run.commands import ChildCommand
from opd.run.environment import child_environment
from opd.run.hang import HangWatch, RankHung
from opd.run.lock import lock_descriptors
from opd.run.status import DONE, FAILED, MESSAGE_MARK, USAGE_ERROR
from opd.run.stop import STOP
from opd.serving.parent import parent_variable

POLL_S = 0.2
STACKS_S = 1.0
ERROR_CHARACTERS = 500
EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt)\b")
"""The line under a stack trace that names the exception."""


class WorkerFailed(RunError):
    """A training process ended with an error; the message is its own, or the end of its log."""


class WorkerLost(WorkerFailed):
    """A training process was lost: killed, hung, or ended in a way that it did not explain."""


@contextmanager
def started_ranks(
    commands: Sequence[ChildCommand], environment: dict[str, str], logs: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks, ended at once with the context: after a failure one may wait in a collective for ever."""
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank, command in enumerate(commands):
            ranks.append(_start(command, environment, rank, logs))
        yield ranks
    finally:
        STOP.finishes_step = False
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()
        rmtree(beat_path(logs.parent, 0).parent, ignore_errors=True)


def _start(
    command: ChildCommand, environment: dict[str, str], rank: int, logs: Path
) -> subprocess.Popen[bytes]:
    """Rank 0 writes to the terminal on stdout; everything else goes to logs/rank_<n>.log."""
    log = (logs / f"rank_{rank}.log").open("wb")
    with log:
        return subprocess.Popen(
            command.words,
            env=child_environment() | command.environment | environment | parent_variable(),
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else log,
            stderr=log,
            pass_fds=lock_descriptors(),
        )


def wait_for_ranks(
    ranks: Sequence[subprocess.Popen[bytes]],
    logs: Path,
    watch: HangWatch,
    servers_are_ready: Callable[[], bool],
) -> None:
    """Wait until all ranks are done; the first failure is raised at once. A signal is passed on to them.

    ``servers_are_ready`` raises when a server is lost for good. While it returns False no rank is late.
    Raises ValueError with the message of a rank for configuration errors, WorkerLost when a run from the
    last checkpoint may succeed, WorkerFailed otherwise.
    """
    STOP.finishes_step = True
    passed_on = False
    while True:
        if STOP() and not passed_on:
            passed_on = True
            for process in ranks:
                process.terminate()
        statuses = [process.poll() for process in ranks]
        if STOP() and -signal.SIGTERM in statuses:
            raise RunError(f"ended by {STOP.name} before the first step")
        _require_sound(statuses, logs, watch)
        if all(status == DONE for status in statuses):
            return
        if not servers_are_ready():
            watch.forgive()
        _require_progress(ranks, logs, watch)
        time.sleep(POLL_S)


def _require_sound(statuses: Sequence[int | None], logs: Path, watch: HangWatch) -> None:
    """Raise the failure that explains the others: a rank's own words, then a signal, then the rest."""
    failures: list[tuple[int, int]] = []
    for rank, status in enumerate(statuses):
        if status == DONE and watch.phase(rank)[0] != RunPhase.done:
            phase, step = watch.phase(rank)
            raise WorkerLost(
                f"process {rank} left with status 0 in phase {phase} of step {step}, before the run was "
                f"done; look at {logs / f'rank_{rank}.log'}"
            )
        if status not in (None, DONE):
            failures.append((rank, status))
    if failures:
        rank, status = min(failures, key=lambda each: _priority(logs, *each))
        _raise_failure(logs / f"rank_{rank}.log", rank, status)


def _priority(logs: Path, rank: int, status: int) -> int:
    if status in (USAGE_ERROR, FAILED) and _messages(logs / f"rank_{rank}.log"):
        return 0
    return 1 if status < 0 else 2


def _require_progress(
    ranks: Sequence[subprocess.Popen[bytes]], logs: Path, watch: HangWatch
) -> None:
    try:
        watch.check()
    except RankHung as error:
        for process in ranks:
            process.send_signal(signal.SIGUSR1)  # its stack goes to its log
        time.sleep(STACKS_S)
        raise WorkerLost(f"{error}; the stacks of all ranks are at the end of {logs}") from None


def _messages(log: Path) -> list[str]:
    lines = log.read_text(errors="replace").splitlines()
    return [line.removeprefix(MESSAGE_MARK) for line in lines if line.startswith(MESSAGE_MARK)]


def _raise_failure(log: Path, rank: int, status: int) -> None:
    lines, marked = log.read_text(errors="replace").splitlines(), _messages(log)
    if status == USAGE_ERROR:
        raise ValueError(marked[-1] if marked else lines[-1])
    if status == FAILED and marked:
        raise WorkerFailed(f"{marked[-1]} (details: {log})")
    if status < 0:
        raise WorkerLost(f"process {rank} was ended by {_signal_name(-status)} (details: {log})")
    raise WorkerLost(
        f"process {rank} ended with status {status}: {_last_error(lines)} (details: {log})"
    )


def _last_error(lines: Sequence[str]) -> str:
    """The line of the last exception in a log, else the last line with words."""
    found = [line for line in lines if EXCEPTION.match(line)] or [s for s in lines if s.strip()]
    return found[-1].strip()[:ERROR_CHARACTERS] if found else "it wrote nothing"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
