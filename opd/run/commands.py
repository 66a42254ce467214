"""What a run starts: the command and the environment of every process, before anything is started."""

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from opd.config.arguments import as_arguments
from opd.config.launch import count_processes
from opd.config.rollout import (
    RolloutServerConfig,
    ServerRolloutConfig,
    VllmEngineConfig,
    VllmRolloutConfig,
    engine_dtype,
)
from opd.config.schema import Config
from opd.config.teacher import ServedTeacherConfig, TeacherEngineConfig, TeacherServerConfig
from opd.run.environment import core_share
from opd.run.placement import PlacedServer, Placement
from opd.run.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildCommand:
    """A child process: the arguments of Python, and the variables that it gets beside its parent's."""

    arguments: tuple[str, ...]
    environment: dict[str, str]

    @property
    def words(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, *self.arguments]


def rank_commands(
    recipe: Recipe, placement: Placement, folder: Path, *, port: int
) -> list[ChildCommand]:
    """The training processes of a run in ``folder``; they meet at ``port``.

    All of them see the GPUs of the ranks, and a rank takes the one of its number.
    """
    quoted = str(folder).replace("'", r"\'")  # a folder's name may contain = and commas
    arguments = (
        "-m",
        "opd.run.worker",
        str(recipe.path),
        *recipe.overrides,
        *engine_settings(recipe.config, placement),
        f"run.dir='{quoted}'",
    )
    visible = placement.cards.visible(placement.rank_cards)
    return [
        ChildCommand(
            arguments=arguments, environment=worker_environment(recipe.config, rank, port) | visible
        )
        for rank in range(count_processes(recipe.config))
    ]


def engine_settings(config: Config, placement: Placement) -> list[str]:
    """The overrides with which rollout engines on GPUs take their share of memory."""
    shares = [server.gpu_memory_utilization for server in placement.rollout_servers]
    if isinstance(config.rollout, VllmRolloutConfig):
        shares = [placement.engine_utilization]
    if not (placement.cards.count and shares):
        return []
    return [f"rollout.gpu_memory_utilization={min(shares):g}"]


def worker_environment(config: Config, rank: int, port: int) -> dict[str, str]:
    """The variables of torchrun, and the share of the CPU cores of a rank."""
    processes = count_processes(config)
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **core_share(rank, processes, config.launch.threads),
    }


def rollout_commands(
    config: Config, placement: Placement, *, max_length: int
) -> list[ChildCommand]:
    """The rollout servers that the run starts; ``max_length`` is the longest prompt plus completion."""
    servers = placement.rollout_servers
    return [
        ChildCommand(
            arguments=(
                *("-m", "opd.run.serve", "rollout"),
                *as_arguments(rollout_server_config(config, server, max_length)),
            ),
            environment=core_share(number, len(servers), config.launch.threads)
            | placement.cards.visible(server.cards),
        )
        for number, server in enumerate(servers)
    ]


def rollout_server_config(
    config: Config, server: PlacedServer, max_length: int
) -> RolloutServerConfig:
    """The configuration of a rollout server that a run starts."""
    rollout = config.rollout
    assert isinstance(rollout, ServerRolloutConfig)
    engine: dict[str, Any] = {f.name: getattr(rollout, f.name) for f in fields(VllmEngineConfig)}
    engine["max_model_len"] = max_length
    engine["gpu_memory_utilization"] = server.gpu_memory_utilization
    return RolloutServerConfig(
        **engine,
        model=server.model,
        dtype=engine_dtype(config),
        seed=config.seed,
        trust_remote_code=config.student.trust_remote_code,
    )


def teacher_commands(config: Config, placement: Placement) -> list[ChildCommand]:
    """The teacher servers that the run starts, in the order of ``placement.teachers``."""
    return [
        teacher_command(
            teacher_server_config(config, server), placement.cards.visible(server.cards)
        )
        for server in placement.teachers
    ]


def teacher_command(config: TeacherServerConfig, environment: dict[str, str]) -> ChildCommand:
    """A teacher server with these settings."""
    arguments = ("-m", "opd.run.serve", "teacher", *as_arguments(config))
    return ChildCommand(arguments=arguments, environment=environment)


def teacher_server_config(config: Config, server: PlacedServer) -> TeacherServerConfig:
    """The configuration of a teacher server that a run starts; on a CPU it is split as the settings say."""
    teacher = config.teacher
    assert isinstance(teacher, ServedTeacherConfig)
    shared = {f.name: getattr(teacher, f.name) for f in fields(TeacherEngineConfig)}
    return replace(
        TeacherServerConfig(model=server.model, **shared),
        tensor_parallel_size=len(server.cards) or teacher.tensor_parallel_size or 1,
        gpu_memory_utilization=server.gpu_memory_utilization,
    )
