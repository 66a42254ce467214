"""Stands in for srun, scontrol, curl, sleep, torchrun, opd and python, by the name it is called with.

Each call is a JSON line in $FAKE_LOG: name, arguments, environment, process id. A fake srun starts the
tasks of a step; a fake `opd teacher` is ready at once, and ends after $FAKE_TEACHER_S seconds with
$FAKE_TEACHER_STATUS; a fake torchrun ends after $FAKE_TRAIN_S seconds with $FAKE_TRAIN_STATUS.
"""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import takewhile
from pathlib import Path

ENVIRONMENT = ("OPD_TEACHER_TOKEN", "CUDA_VISIBLE_DEVICES", "FAKE_NODE")
LOG = Path(os.environ["FAKE_LOG"])


def main(name: str, arguments: list[str]) -> int:
    with LOG.open("a") as log:
        environment = {key: os.environ[key] for key in ENVIRONMENT if key in os.environ}
        call = {"name": name, "arguments": arguments, "environment": environment}
        log.write(json.dumps(call | {"pid": os.getpid()}) + "\n")
    match name:
        case "scontrol":
            print(os.environ["FAKE_NODES"].replace(",", "\n"))
        case "python":
            print(os.environ["FAKE_GPUS"])
        case "sleep":
            time.sleep(0.05)
        case "curl":
            reachable = "FAKE_UNREACHABLE" not in os.environ
            return 0 if reachable and _ready(arguments[-1]).exists() else 7
        case "srun":
            return _run_step(arguments)
        case "torchrun":
            return _end_after("TRAIN")
        case "opd" if arguments[0] == "teacher":
            port = next(a for a in arguments if a.startswith("port="))
            if os.environ.get("FAKE_TEACHER_STATUS", "0") == "0" or _seconds("TEACHER") > 0:
                _ready(
                    f"http://{os.environ['FAKE_NODE']}:{port.removeprefix('port=')}/health"
                ).touch()
            return _end_after("TEACHER")
    return 0


def _ready(url: str) -> Path:
    return LOG.with_name(url.replace("/", "_"))


def _seconds(kind: str) -> float:
    return float(os.environ.get(f"FAKE_{kind}_S", "0"))


def _end_after(kind: str) -> int:
    time.sleep(_seconds(kind))
    return int(os.environ.get(f"FAKE_{kind}_STATUS", "0"))


def _run_step(arguments: list[str]) -> int:
    """Start every task; where one fails, or on SIGTERM, end the others."""
    options = list(takewhile(lambda argument: argument.startswith("--"), arguments))
    command = arguments[len(options) :]
    given = dict(option.removeprefix("--").split("=", 1) for option in options)
    nodes, per_node = given["nodelist"].split(","), int(given["ntasks-per-node"])
    assert len(nodes) == int(given["nodes"])
    assert len(nodes) * per_node == int(given["ntasks"])
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ
            | {"FAKE_NODE": node, "SLURM_LOCALID": str(i), "SLURM_NTASKS_PER_NODE": str(per_node)},
        )
        for node in nodes
        for i in range(per_node)
    ]

    def end(*_: object) -> None:
        for task in tasks:
            task.terminate()
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
    while True:
        statuses = [task.poll() for task in tasks]
        failed = [status for status in statuses if status]
        if failed or None not in statuses:
            for task in tasks:
                task.terminate()
            return abs(failed[0]) if failed else 0
        time.sleep(0.02)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[0]).name, sys.argv[1:]))
