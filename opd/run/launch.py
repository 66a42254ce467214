"""Start a run: check it, examine the teacher, serve it, start one process per GPU, and watch them."""

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from opd import build
from opd.run.recipe import Composed
from opd.run.teacher_servers import started_teachers
from opd.run.worker import DONE, MISTAKE, MISTAKE_MARK, TEACHER_ACCURACY
from opd.config.schema import Config
from opd.config.writing import ServerRolloutConfig

POLL_S = 0.2
GRACE_S = 10.0
TAIL_LINES = 25
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Without a GPU tensors come from malloc. glibc gives large freed ones back to the system and faults them in
again page by page, which can cost more than the arithmetic; this keeps them."""


def restart_keeping_memory() -> None:
    """Begin this command again with freed memory kept: malloc reads its settings at the start only.

    Nothing happens where they are set already, or where there is a GPU.
    """
    if all(name in os.environ for name in KEEP_FREED_MEMORY):
        return
    keep_freed_memory()
    if all(name in os.environ for name in KEEP_FREED_MEMORY):
        os.execv(sys.executable, [sys.executable, "-m", "opd.cli.main", *sys.argv[1:]])


class WorkerFailed(RuntimeError):
    """A training process ended with an error; the message holds the end of its log."""


def keep_freed_memory() -> None:
    """For every process started from here on, where there is no NVIDIA driver; what is set stays."""
    if not Path("/dev/nvidiactl").exists():
        for name, value in KEEP_FREED_MEMORY.items():
            os.environ.setdefault(name, value)


def run_processes(
    recipe: Composed, folder: Path, *, max_length: int, accuracy: float | None
) -> None:
    """Serve teacher and rollouts if the recipe asks for it, train, and return when every rank is done.

    ``max_length`` is the longest prompt plus completion.

    Raises ValueError with a rank's own sentence for the user's mistakes, WorkerFailed otherwise.
    """
    config, logs = recipe.config, folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {} if accuracy is None else {TEACHER_ACCURACY: repr(accuracy)}
    with (
        started_teachers(config, logs) as teachers,
        _rollout_servers(config, max_length, logs) as servers,
    ):
        environment |= servers | teachers.environment
        quoted = str(folder).replace("'", r"\'")  # a folder's name may hold = and commas
        arguments = [str(recipe.recipe), *recipe.overrides, f"run.dir='{quoted}'"]
        workers = [
            _start(arguments, environment, config, rank, port, logs)
            for port in [_free_port()]
            for rank in range(config.launch.processes)
        ]
        try:
            _watch(workers, logs)
        finally:
            _end(workers)


@contextmanager
def _rollout_servers(config: Config, max_length: int, logs: Path) -> Iterator[dict[str, str]]:
    """Start them all at once; yields what workers must find in their environment."""
    rollout = config.rollout
    if not isinstance(rollout, ServerRolloutConfig) or rollout.urls:
        yield {}
        return
    from opd.rollout.options import TOKEN_VARIABLE
    from opd.serving.child import running_service
    from opd.serving.options import arguments_of

    arguments = ["-m", "opd.run.serve", *arguments_of(build.rollout_options(config, max_length))]
    devices = rollout.devices.split(",") if rollout.devices else []
    token = secrets.token_urlsafe(32)
    starting = [
        running_service(
            "rollout server",
            arguments,
            variable=TOKEN_VARIABLE,
            token=token,
            log_path=logs / f"rollout_{i}.log",
            environment=_cores(i, rollout.servers, config.launch.threads)
            | ({"CUDA_VISIBLE_DEVICES": devices[i % len(devices)]} if devices else {}),
        )
        for i in range(rollout.servers)
    ]
    with ExitStack() as stack:
        with ThreadPoolExecutor(len(starting)) as pool:
            started = [pool.submit(stack.enter_context, service) for service in starting]
        servers = [future.result() for future in started]
        yield {build.ROLLOUT_URLS: ",".join(s.url for s in servers), TOKEN_VARIABLE: token}


def _cores(place: int, of: int, threads: int | None) -> dict[str, str]:
    """The share of the CPU cores of one of ``of`` processes."""
    cores = sorted(os.sched_getaffinity(0))
    share = cores[place % len(cores) :: of] or cores[:1]
    return {
        "OMP_NUM_THREADS": str(threads or len(share)),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, share)),
        "TOKENIZERS_PARALLELISM": "false",
    }


def worker_environment(config: Config, rank: int, port: int) -> dict[str, str]:
    """torchrun's names, and the CPU cores that a rank may use when there is no GPU."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(config.launch.processes),
        "LOCAL_WORLD_SIZE": str(config.launch.processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **_cores(rank, config.launch.processes, config.launch.threads),
    }


def _start(
    arguments: Sequence[str],
    environment: dict[str, str],
    config: Config,
    rank: int,
    port: int,
    logs: Path,
) -> subprocess.Popen[bytes]:
    """Rank 0 speaks to the terminal on stdout; everything else goes to logs/rank_<n>.log."""
    log = (logs / f"rank_{rank}.log").open("wb")
    with log:
        return subprocess.Popen(
            [sys.executable, "-m", "opd.run.worker", *arguments],
            env=os.environ | worker_environment(config, rank, port) | environment,
            stdin=subprocess.DEVNULL,
            stdout=None if rank == 0 else log,
            stderr=log,
        )


def _watch(workers: Sequence[subprocess.Popen[bytes]], logs: Path) -> None:
    """Wait for all; the first that fails fails everybody."""
    while True:
        statuses = [w.poll() for w in workers]
        for rank, status in enumerate(statuses):
            if status not in (None, DONE):
                _explain(logs / f"rank_{rank}.log", rank, status)
        if all(status == DONE for status in statuses):
            return
        time.sleep(POLL_S)


def _explain(log: Path, rank: int, status: int) -> None:
    lines = log.read_text(errors="replace").splitlines()
    if status == MISTAKE:
        said = [line for line in lines if line.startswith(MISTAKE_MARK)]
        raise ValueError(said[-1].removeprefix(MISTAKE_MARK) if said else lines[-1])
    tail = "\n".join(lines[-TAIL_LINES:])
    raise WorkerFailed(f"process {rank} ended with status {status}; the end of {log}:\n{tail}")


def _end(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + GRACE_S
    for worker in workers:
        try:
            worker.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
