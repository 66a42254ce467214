"""A small run whose processes are killed or stopped at a phase of a step, and what must be left of it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from opd.heartbeat import Beat, read_beat
from opd.phases import RunPhase
from tests.support.command import OPD, environment

COMMAND = [
    "train", "quickstart", "train.prompts_per_step=4", "rollout.max_tokens=4", "optim.warmup_steps=2",
    "data.eval=null", "eval.kl_prompts=0", "eval.every=0", "rollout=transformers", "teacher.backend=torch",
    "launch.engine=torch", "launch.processes=1", "train.steps=8", "save.every=2",
]  # fmt: skip


class DisturbedRun:
    """One ``opd train`` in ``home``, started again when it ends."""

    def __init__(
        self, home: Path, name: str, *overrides: str, command: list[str] = COMMAND
    ) -> None:
        self.home, self.folder = home, home / name
        self._command = [*OPD, *command, *overrides, f"run.dir={name}"]
        self.temporary = home / f"{name}_tmp"
        self.temporary.mkdir(exist_ok=True)
        self.errors = ""
        self._killed: set[int] = set()
        self._remembered_at = 0.0
        self._known: dict[int, psutil.Process] = {}
        self.shared_memory = set(os.listdir("/dev/shm"))
        self.start()

    def start(self) -> None:
        """Start the command."""
        self._log = (self.home / f"{self.folder.name}.err").open("w+")
        self.launcher = subprocess.Popen(
            self._command,
            cwd=self.home,
            env=environment() | {"TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=self._log,
        )

    def wait_for(self, phase: RunPhase, step: int) -> Beat:
        """The first heartbeat of a living rank in a phase of this step or a later one."""
        while True:
            assert self.launcher.poll() is None, self.read_errors()
            self._remember()
            beat = read_beat(self.folder, 0)
            alive = beat is not None and beat.pid not in self._killed
            if beat is not None and alive and (beat.phase, beat.step >= step) == (phase, True):
                return beat
            time.sleep(0.005)

    def kill(self, who: str, phase: RunPhase, step: int) -> Beat:
        """SIGKILL at the first heartbeat in a phase of this step or a later one; what ends is started again.

        Returns that heartbeat. The launcher starts ranks and servers again by itself, where its settings
        say so.
        """
        beat = self.wait_for(phase, step)
        if who in ("launcher", "rank"):
            self.ignore(beat)
        self.signal(who)
        if who == "launcher":
            self.wait()
            self.start()
        return beat

    def ignore(self, beat: Beat) -> None:
        """The rank of this heartbeat is lost: its record is none of a living rank."""
        self._killed.add(beat.pid)

    def process(self, who: str) -> psutil.Process:
        """The launcher, the rank, or a server by its kind (teacher, rollout)."""
        if who == "launcher":
            return psutil.Process(self.launcher.pid)
        while True:
            for each in psutil.Process(self.launcher.pid).children(recursive=True):
                try:
                    words = each.cmdline()
                except psutil.NoSuchProcess:
                    continue
                found = "opd.run.worker" if who == "rank" else f"opd.run.serve {who}"
                if found in " ".join(words):
                    return each
            time.sleep(0.01)

    def signal(self, who: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to one of them."""
        self._remember()
        self.process(who).send_signal(number)

    def wait(self) -> int:
        """The exit status of the command; what it started is gone by then, or soon after."""
        while self.launcher.poll() is None:
            self._remember()
            time.sleep(0.2)
        _, alive = psutil.wait_procs(self._known.values(), timeout=300)
        assert not alive, f"processes outlived their launcher: {alive}"
        return self.launcher.returncode

    def read_errors(self) -> str:
        """What the command wrote to stderr since it was started last."""
        self._log.flush()
        return Path(self._log.name).read_text()

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def require_same(self, whole: Path) -> None:
        """The final weights have the bits of an undisturbed run, every step is logged once, and no process,
        no shared memory and no temporary file is left."""
        expected, found = (
            load_file(run / "final" / "model.safetensors") for run in (whole, self.folder)
        )
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
        rows = [json.loads(r) for r in (whole / "metrics.jsonl").read_text().splitlines()]
        assert self.steps() == [row["step"] for row in rows]
        self.require_nothing_left()

    def require_nothing_left(self) -> None:
        """No process, no shared-memory segment and no temporary file."""
        assert not [p for p in self._known.values() if p.is_running() and p.status() != "zombie"]
        deadline = time.monotonic() + 60  # other processes of the machine have segments for a while
        while left := set(os.listdir("/dev/shm")) - self.shared_memory:
            assert time.monotonic() < deadline, left
            time.sleep(1)
        files = [p.name for p in self.temporary.iterdir()]
        assert not [name for name in files if not name.startswith("torchinductor_")]
        assert not (self.folder / ".tmp").exists()
        assert not (self.folder / "logs" / "beats").exists()

    def _remember(self) -> None:
        """Look up all descendants, not more often than five times a second."""
        if time.monotonic() - self._remembered_at < 0.2:
            return
        self._remembered_at = time.monotonic()
        try:
            for each in psutil.Process(self.launcher.pid).children(recursive=True):
                self._known.setdefault(each.pid, each)
        except psutil.NoSuchProcess:
            pass
