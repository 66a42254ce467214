"""Starts and watches the processes of a run: teacher servers, rollout servers, one rank per GPU."""

import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from opd.config.rollout import ServerRolloutConfig
from opd.config.schema import Config
from opd.faults import RunError
from opd.rollout.client import ROLLOUT_URLS
from opd.rollout.wire import TOKEN_VARIABLE
from opd.run.commands import rank_commands, rollout_commands
from opd.run.environment import child_environment, trace_processes
from opd.run.hang import HangWatch
from opd.run.placement import Placement
from opd.run.ranks import WorkerFailed, WorkerLost, started_ranks, wait_for_ranks
from opd.run.recipe import Recipe
from opd.run.stop import STOP
from opd.run.teacher_servers import started_teachers
from opd.serving.child import started_service
from opd.serving.supervised import ServiceSupervisor, supervised_service
from opd.train.checkpoints import newest_checkpoint, set_damaged_aside

TEACHER_ACCURACY = "OPD_TEACHER_ACCURACY"
"""Environment variable with the teacher's accuracy in the evaluation of the run."""


class ServerLost(RunError):
    """A server that the run started ended, and its restarts are used up."""


def run_processes(
    recipe: Recipe,
    placement: Placement,
    folder: Path,
    *,
    max_length: int,
    teacher_accuracy: float | None,
) -> None:
    """Start the servers that the recipe needs, train, and return when every rank is done.

    ``max_length`` is the longest prompt plus completion. After a rank was lost the run goes on from its
    last checkpoint, ``launch.restarts`` times.

    Raises ValueError with the message of the rank for configuration errors, WorkerFailed for another
    failure of a rank, ServerLost when a server cannot be started again.
    """
    config, logs = recipe.config, folder / "logs"
    trace_processes(config, folder)
    logs.mkdir(parents=True, exist_ok=True)
    environment = {} if teacher_accuracy is None else {TEACHER_ACCURACY: repr(teacher_accuracy)}
    with (
        started_teachers(config, placement, logs) as teachers,
        _rollout_servers(config, placement, max_length, logs) as rollouts,
    ):
        environment |= rollouts.environment | teachers.environment
        # any server of a model will do for the teacher, and a rank has one rollout server
        groups = [*teachers.supervisors.values(), *([each] for each in rollouts.supervisors)]
        for restart in range(config.launch.restarts + 1):
            try:
                _train(recipe, placement, folder, environment, groups)
                break
            except WorkerLost as error:
                if restart == config.launch.restarts or STOP():
                    raise
                _announce_restart(error, folder, restart + 1, config)
    if not (folder / "final").is_dir():
        raise WorkerFailed(f"the run ended without a final model; look at {logs}")


def _train(
    recipe: Recipe,
    placement: Placement,
    folder: Path,
    environment: dict[str, str],
    servers: Sequence[Sequence[ServiceSupervisor]],
) -> None:
    """Run all ranks once, from the last checkpoint to the end."""
    config, logs = recipe.config, folder / "logs"
    commands = rank_commands(recipe, placement, folder, port=_free_port())
    print(f"load and compare the models ... (logs: {logs})", flush=True)
    with started_ranks(commands, environment, logs) as ranks:
        watch = HangWatch(folder, len(ranks), config.launch.deadlines)
        wait_for_ranks(ranks, logs, watch, lambda: _are_ready(servers))


def _are_ready(servers: Sequence[Sequence[ServiceSupervisor]]) -> bool:
    """Whether every server that was not given up is ready. Raises ServerLost when all of a group are lost."""
    for group in servers:
        if all(server.failure for server in group):
            raise ServerLost(group[0].failure)
    return all(server.is_ready for group in servers for server in group if not server.failure)


def _announce_restart(error: WorkerLost, folder: Path, restart: int, config: Config) -> None:
    for warning in set_damaged_aside(folder):
        print(f"opd: warning: {warning}", file=sys.stderr)
    newest = newest_checkpoint(folder)
    start = "the start" if newest is None else f"the checkpoint of step {newest[1]}"
    print(
        f"opd: {error}\nopd: restart {restart} of {config.launch.restarts}: the run goes on from {start}",
        file=sys.stderr,
        flush=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _StartedRollouts:
    """The rollout servers of a run, and the environment variables that its ranks need."""

    environment: dict[str, str]
    supervisors: list[ServiceSupervisor]


@contextmanager
def _rollout_servers(
    config: Config, placement: Placement, max_length: int, logs: Path
) -> Iterator[_StartedRollouts]:
    """Start all rollout servers at once."""
    commands = rollout_commands(config, placement, max_length=max_length)
    if not commands:
        yield _StartedRollouts(environment={}, supervisors=[])
        return
    assert isinstance(config.rollout, ServerRolloutConfig)
    token = secrets.token_urlsafe(32)
    starting = [
        supervised_service(
            started_service(
                "rollout server",
                command.arguments,
                variable=TOKEN_VARIABLE,
                token=token,
                log_path=logs / f"rollout_{i}.log",
                environment=child_environment() | command.environment,
            ),
            "rollout server",
            restarts=config.rollout.restarts,
            silent_s=config.launch.deadlines.server,
            log=str(logs / f"rollout_{i}.log"),
        )
        for i, command in enumerate(commands)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            started = [pool.submit(stack.enter_context, service) for service in starting]
        servers = [future.result() for future in started]
        urls = ",".join(server.service.url for server in servers)
        yield _StartedRollouts(
            environment={ROLLOUT_URLS: urls, TOKEN_VARIABLE: token}, supervisors=servers
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
