"""Runs of the real command, as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

OPD = [sys.executable, "-m", "opd.cli.main"]
SMALL = [
    "train.prompts_per_step=16",
    "optim.warmup_steps=2",
    "data.eval_limit=24",
    "eval.kl_prompts=8",
    "eval.teacher_accuracy=false",
]
"""Overrides that make the quickstart short without changing what it is made of."""


def environment() -> dict[str, str]:
    """The caller's, without what this test process set for its own engines."""
    dropped = ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE")
    return {k: v for k, v in os.environ.items() if k not in dropped}


def opd(*arguments: str, cwd: Path, timeout: float = 1500) -> subprocess.CompletedProcess[str]:
    """Run ``opd`` to its end."""
    return subprocess.run(
        [*OPD, *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
