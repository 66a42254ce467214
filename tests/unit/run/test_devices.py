"""GPUs are counted before anything starts, and vLLM's workers are spawned."""

import os
from pathlib import Path

import pytest
import torch

from opd import world
from opd.run import devices
from opd.run.devices import require_devices, visible_devices
from opd.run.environment import child_environment
from opd.run.recipe import load_recipe
from opd.vllm_start import CHILDREN, set_start_method


def with_cards(monkeypatch: pytest.MonkeyPatch, cards: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize(
    ("cards", "processes", "fits"),
    [(0, 1, True), (0, 8, True), (1, 1, True), (1, 2, False), (2, 2, True), (2, 8, False)],
)
def test_no_more_processes_than_gpus_start(
    monkeypatch: pytest.MonkeyPatch, cards: int, processes: int, fits: bool
) -> None:
    with_cards(monkeypatch, cards)
    monkeypatch.setattr(devices, "DRIVER", Path("/no/driver"))
    config = load_recipe("quickstart", f"launch.processes={processes}").config
    assert visible_devices() == cards
    if fits:
        require_devices(config)
    else:
        with pytest.raises(
            ValueError, match=rf"set launch.processes={cards}, or make more visible"
        ):
            require_devices(config)
        monkeypatch.setenv("RANK", "0")  # another launcher counts for itself
        require_devices(config)


def test_a_gpu_that_torch_cannot_use_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_cards(monkeypatch, 0)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.1\nGCC version: 9\n")
    monkeypatch.setattr(devices, "DRIVER", driver)
    config = load_recipe("quickstart").config
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ValueError, match=r"Kernel Module 470.1.*the driver is too old") as error:
        require_devices(config)
    assert "\n" not in str(error.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    require_devices(config)


@pytest.mark.parametrize(("local_rank", "visible"), [(0, 1), (1, 2), (7, 8)])
def test_a_rank_takes_the_gpu_of_its_number(local_rank: int, visible: int) -> None:
    assert world._own_device(local_rank, visible) == local_rank


@pytest.mark.parametrize(("local_rank", "visible"), [(1, 1), (2, 2), (7, 4)])
def test_a_rank_without_a_gpu_of_its_own_is_refused(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, visible: int
) -> None:
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    with pytest.raises(ValueError, match="has no GPU of its own"):
        world._own_device(local_rank, visible)


def test_a_task_that_sees_only_its_own_gpu_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert world._own_device(3, 1) == 0
    assert os.environ["LOCAL_RANK"] == "0"


def test_workers_of_vllm_are_spawned_even_where_cuda_has_been_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.utils import system_utils

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(system_utils, "_maybe_force_spawn", lambda: None)  # as on a CUDA platform
    for name in CHILDREN:
        monkeypatch.delenv(name, raising=False)
    assert system_utils.get_mp_context().get_start_method() == "fork"
    set_start_method()
    assert system_utils.get_mp_context().get_start_method() == "spawn"
    assert child_environment()["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "forkserver")
    set_start_method()
    assert child_environment()["VLLM_WORKER_MULTIPROC_METHOD"] == "forkserver"
