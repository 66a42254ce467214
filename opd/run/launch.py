"""Starts and watches the processes of a run: teacher servers, rollout servers, one rank per GPU."""

import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opd.config.schema import Config
from opd.faults import RunError
from opd.rollout.client import ROLLOUT_URLS
from opd.rollout.wire import TOKEN_VARIABLE
from opd.run.commands import ChildCommand, rank_commands, rollout_commands
from opd.run.environment import child_environment
from opd.run.lock import lock_descriptors
from opd.run.placement import Placement
from opd.run.recipe import Recipe
from opd.run.status import DONE, FAILED, MESSAGE_MARK, USAGE_ERROR
from opd.run.stop import STOP
from opd.run.teacher_servers import started_teachers
from opd.serving.child import running_service
from opd.serving.parent import parent_variable

TEACHER_ACCURACY = "OPD_TEACHER_ACCURACY"
"""Environment variable with the teacher's accuracy in the evaluation of the run."""
POLL_S = 0.2
TAIL_LINES = 25


class WorkerFailed(RunError):
    """A training process ended with an error; the message is its own, or the end of its log."""


def run_processes(
    recipe: Recipe,
    placement: Placement,
    folder: Path,
    *,
    max_length: int,
    teacher_accuracy: float | None,
) -> None:
    """Start the servers that the recipe needs, train, and return when every rank is done.

    ``max_length`` is the longest prompt plus completion.

    Raises ValueError with the message of the rank for configuration errors, WorkerFailed otherwise.
    """
    config, logs = recipe.config, folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {} if teacher_accuracy is None else {TEACHER_ACCURACY: repr(teacher_accuracy)}
    with (
        started_teachers(config, placement, logs) as teachers,
        _rollout_servers(config, placement, max_length, logs) as servers,
    ):
        environment |= servers | teachers.environment
        commands = rank_commands(recipe, placement, folder, port=_free_port())
        workers = [
            _start(command, environment, rank, logs) for rank, command in enumerate(commands)
        ]
        try:
            _watch(workers, logs)
        finally:
            _end(workers)
    if not (folder / "final").is_dir():
        raise WorkerFailed(f"the run ended without a final model; look at {logs}")


@contextmanager
def _rollout_servers(
    config: Config, placement: Placement, max_length: int, logs: Path
) -> Iterator[dict[str, str]]:
    """Start all rollout servers at once; yields the environment variables that workers need."""
    commands = rollout_commands(config, placement, max_length=max_length)
    if not commands:
        yield {}
        return
    token = secrets.token_urlsafe(32)
    starting = [
        running_service(
            "rollout server",
            command.arguments,
            variable=TOKEN_VARIABLE,
            token=token,
            log_path=logs / f"rollout_{i}.log",
            environment=child_environment() | command.environment,
        )
        for i, command in enumerate(commands)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            started = [pool.submit(stack.enter_context, service) for service in starting]
        servers = [future.result() for future in started]
        yield {ROLLOUT_URLS: ",".join(s.url for s in servers), TOKEN_VARIABLE: token}


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


def _watch(workers: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    """Wait for all workers; the first failure is raised at once. A signal is passed on to them."""
    STOP.finishes_step = True
    passed_on = False
    while True:
        if STOP() and not passed_on:
            passed_on = True
            for worker in workers:
                worker.terminate()
        statuses = [w.poll() for w in workers]
        for rank, status in enumerate(statuses):
            if STOP() and status == -signal.SIGTERM:
                raise RunError(f"ended by {STOP.name} before the first step")
            if status not in (None, DONE):
                _raise_failure(logs / f"rank_{rank}.log", rank, status)
        if all(status == DONE for status in statuses):
            return
        time.sleep(POLL_S)


def _raise_failure(log: Path, rank: int, status: int) -> None:
    lines = log.read_text(errors="replace").splitlines()
    marked = [line.removeprefix(MESSAGE_MARK) for line in lines if line.startswith(MESSAGE_MARK)]
    if status == USAGE_ERROR:
        raise ValueError(marked[-1] if marked else lines[-1])
    if status == FAILED and marked:
        raise WorkerFailed(f"{marked[-1]} (details: {log})")
    tail = "\n".join(lines[-TAIL_LINES:])
    raise WorkerFailed(f"process {rank} ended with status {status}; the end of {log}:\n{tail}")


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs at once: after a failure a rank may wait in a collective without end."""
    STOP.finishes_step = False
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
