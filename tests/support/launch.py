"""Start a script in ranks that find each other, as a launcher does, and watch them work on cases.

What counts is the results of a case, not how a process ended. Where ranks end or hang before all
cases are done, the first unfinished case is given up and new ranks go on with the rest.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.support.results import Results, case_folder

REPOSITORY = Path(__file__).parents[2]
RANKS = ["-m", "tests.support.ranks"]
QUIET_S = 1500.0
"""Ranks without a new result or a line of output for so long hang; a slow, busy machine needs a tenth."""
ALONE_S = 300.0
"""The same when a rank has ended before its peers: they can finish a case, or wait for it in vain."""
MOST_IDLE_STARTS = 3
"""So many starts without a single result, one after the other: the script is broken, not a case."""
TAIL = 3000
"""Characters of a rank's output that a report shows."""


def run_ranks(results: Results, processes: int, kind: str, cases: Sequence[str]) -> None:
    """Run cases of ``tests.support.ranks``, in the order given."""
    run_cases(results, processes, [*RANKS, kind], cases)


def run_cases(
    results: Results,
    processes: int,
    command: Sequence[str],
    cases: Sequence[str],
    *,
    quiet_s: float = QUIET_S,
    alone_s: float = ALONE_S,
) -> None:
    """Run ``python COMMAND OUT CASE...`` in so many ranks until each case is done or given up.

    Raises nothing for a rank that fails: ``results.missing`` holds the end of its output.
    """
    unfinished, idle_starts = list(cases), 0
    while unfinished:
        given = unfinished
        report = _start_and_watch(results, processes, command, given, quiet_s, alone_s)
        unfinished = [case for case in given if not results.has(case)]
        idle_starts = idle_starts + 1 if unfinished == given else 0
        given_up = unfinished if idle_starts == MOST_IDLE_STARTS else unfinished[:1]
        for case in given_up:
            results.missing[case] = f"the case {case} has no results: {report}"
        unfinished = unfinished[len(given_up) :]


def _start_and_watch(
    results: Results,
    processes: int,
    command: Sequence[str],
    cases: Sequence[str],
    quiet_s: float,
    alone_s: float,
) -> str:
    """Start ranks once, wait for results, end what still runs; a report of how the ranks ended."""
    logs = [
        results.out / f"{case_folder(results.out, cases[0]).name}.rank_{rank}.log"
        for rank in range(processes)
    ]
    with ExitStack() as stack:
        started: list[subprocess.Popen[bytes]] = []
        stack.callback(_end, started)
        port = _free_port()
        for rank, log in enumerate(logs):
            # files, not pipes: a full pipe would stop a rank that others wait for
            output = stack.enter_context(log.open("wb"))
            started.append(
                subprocess.Popen(
                    [sys.executable, *command, str(results.out), *cases],
                    cwd=REPOSITORY,
                    env=os.environ | _rank_environment(rank, processes, port),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
        hung = _watch(results, started, logs, cases, quiet_s, alone_s)
        statuses = [process.poll() for process in started]
    return _report(statuses, logs, hung)


def _watch(
    results: Results,
    started: Sequence[subprocess.Popen[bytes]],
    logs: Sequence[Path],
    cases: Sequence[str],
    quiet_s: float,
    alone_s: float,
) -> str:
    """Wait until every case is done, every rank has ended, or there is no sign of life for too long.

    The last is what it returns a description of.
    """
    life, since = None, time.monotonic()
    while True:
        done = sum(map(results.has, cases))
        running = sum(process.poll() is None for process in started)
        if done == len(cases) or not running:
            return ""
        signs = (done, running, sum(log.stat().st_size for log in logs))
        if signs != life:
            life, since = signs, time.monotonic()
        patience = quiet_s if running == len(started) else alone_s
        if time.monotonic() - since > patience:
            return f"for {patience:g} s there was neither a result nor output; "
        time.sleep(0.05)


def _report(statuses: Sequence[int | None], logs: Sequence[Path], hung: str) -> str:
    """How ranks ended, and the end of the output of those that failed, else of all."""
    ended = [f"rank {r} {_ending(status)}" for r, status in enumerate(statuses)]
    failed = [r for r, status in enumerate(statuses) if status] or range(len(statuses))
    tails = [
        f"--- output of rank {r} ---\n{logs[r].read_bytes().decode(errors='replace')[-TAIL:]}"
        for r in failed
    ]
    return "\n".join([hung + ", ".join(ended), *tails])


def _ending(status: int | None) -> str:
    return "was still running" if status is None else f"ended with status {status}"


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.kill()
    for process in started:
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The names of torchrun."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
