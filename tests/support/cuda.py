"""A machine with GPUs that are not there: what torch and the environment say of them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd.run import devices

GIB = 1 << 30
LAUNCHER_PREFIXES = ("SLURM_", "ACCELERATE_", "TORCHELASTIC_")
LAUNCHER_NAMES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "OPD_TEACHER_URLS",
    "OPD_ROLLOUT_URLS",
)


def pretend_cards(
    monkeypatch: pytest.MonkeyPatch, count: int, *, visible: str | None = None, memory_gib: int = 80
) -> None:
    """Let torch find ``count`` GPUs that CUDA_VISIBLE_DEVICES names, and no launcher's variables."""
    for name in list(os.environ):
        if name in LAUNCHER_NAMES or name.startswith(LAUNCHER_PREFIXES):
            monkeypatch.delenv(name)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    properties = SimpleNamespace(total_memory=memory_gib * GIB, name="Pretended GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda card: properties)
    monkeypatch.setattr(devices, "DRIVER", Path("/no/driver"))
    monkeypatch.setattr(devices, "CPU_VLLM", "no-such-distribution")
