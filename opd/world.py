"""Rank, size, and sums over ranks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The processes (ranks) that train together; ``device`` is this rank's."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks in float64; every rank passes the same names. Collective."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def max(self, values: Mapping[str, float]) -> dict[str, float]:
        """Maxima over ranks; every rank passes the same names. Collective."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def add_up(self, tensor: torch.Tensor) -> None:
        """Sum over ranks, in place; every rank passes the same shape. Collective."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group; only after success, because a failed rank must not be waited for."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _reduced(
        self, values: Mapping[str, float], op: dist.ReduceOp.RedOpType
    ) -> dict[str, float]:
        if self.size == 1 or not values:
            return dict(values)
        names = sorted(values)
        packed = torch.tensor([values[n] for n in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(packed, op=op)
        return dict(zip(names, packed.tolist(), strict=True))


def join_world() -> World:
    """Join the process group that the launcher described in the environment (torchrun's names).

    Without these names the world has one rank. CUDA ranks communicate by nccl, others by gloo. Raises
    ValueError where this rank has no GPU of its own.
    """
    rank = int(os.environ.get("RANK", "0"))
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", _own_device(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "MASTER_ADDR" in os.environ and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timedelta(minutes=30))
    return World(rank=rank, size=size, local_rank=local_rank, device=device)


def _own_device(local_rank: int, visible: int) -> int:
    """The number of this rank's GPU among the visible ones.

    That is the local rank, or 0 under a scheduler that shows every task one GPU of its own; LOCAL_RANK is
    then set to 0 too, because vLLM takes it for the number of the GPU.
    """
    if local_rank < visible:
        return local_rank
    if sees_one_gpu_per_task(os.environ, visible):
        os.environ["LOCAL_RANK"] = "0"
        return 0
    raise ValueError(
        f"rank {local_rank} of this machine has no GPU of its own: {visible} can be seen; start as many "
        "ranks as there are GPUs (launch.processes, --nproc-per-node), or make more visible "
        "(CUDA_VISIBLE_DEVICES)"
    )


def sees_one_gpu_per_task(environment: Mapping[str, str], visible: int) -> bool:
    """Whether srun shows this task one GPU of its own; torchrun inside one task is not that."""
    task = environment.get("SLURM_LOCALID")
    return (
        visible == 1
        and task is not None
        and task == environment.get("LOCAL_RANK")
        and "TORCHELASTIC_RUN_ID" not in environment
    )


def has_group() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def join_alone(device: torch.device) -> None:
    """Make a process group of this process alone, unless it is in one; for a vLLM engine in it.

    vLLM would make the same group around a file in the temporary folder, which a process that ends by
    a signal or by ``os._exit`` leaves behind. This one is kept in memory.
    """
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
