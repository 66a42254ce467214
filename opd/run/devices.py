"""The CUDA devices that a run finds on this machine."""

import os
from pathlib import Path

import torch

from opd.config.schema import Config

DRIVER = Path("/proc/driver/nvidia/version")


def visible_devices() -> int:
    """How many CUDA devices torch can use; 0 on a machine without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def require_devices(config: Config) -> None:
    """ValueError when a GPU is there that torch cannot use, or fewer GPUs than processes.

    An empty CUDA_VISIBLE_DEVICES asks for the CPU. Under another launcher every process sees its own
    devices, and ``join_world`` checks them.
    """
    devices = visible_devices()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if not devices and DRIVER.exists() and not hidden:
        driver = DRIVER.read_text().splitlines()[0]
        raise ValueError(
            f"this machine has an NVIDIA driver ({' '.join(driver.split())}) and torch "
            f"{torch.__version__} finds no GPU that it can use: the driver is too old for this torch, or it "
            "is a CPU build; install opd[gpu] with a driver that its CUDA needs, or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    needed = config.launch.processes
    if 0 < devices < needed and "RANK" not in os.environ:
        raise ValueError(
            f"launch.processes={needed} needs as many GPUs and {devices} can be seen: set "
            f"launch.processes={devices}, or make more visible (CUDA_VISIBLE_DEVICES)"
        )
