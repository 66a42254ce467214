"""Every bundled recipe on 0 to 8 GPUs under every launcher: the processes that would start, or one sentence.

The GPUs are pretended. What a process would do first is done: a worker's arguments are composed, a server's
are parsed, a rank looks for its GPU, and the arguments that vLLM gets are those of a real start.
"""

import inspect
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
import torch
from transformers import AutoConfig, LlamaConfig

from opd import world
from opd.assembly.rollout import EngineInputs, build_engine
from opd.assembly.rollout_server import build_engine_host
from opd.config.arguments import parse_arguments
from opd.config.launch import LaunchEngine
from opd.config.mask import DiscoverMaskConfig, active_mask
from opd.config.rollout import RolloutServerConfig, VllmRolloutConfig
from opd.config.schema import Config, problems
from opd.config.teacher import PoolTeacherConfig, TeacherBackend, TeacherServerConfig
from opd.run import devices, train
from opd.run.commands import ChildCommand, rank_commands, rollout_commands, teacher_commands
from opd.run.devices import find_cards, require_devices, resolved
from opd.run.mask import prepare_mask
from opd.run.place import place
from opd.run.placement import Placement
from opd.run.recipe import Recipe, bundled_recipes, composed, find_recipe
from opd.run.shares import MARGIN
from opd.teacher import backend_vllm
from opd.teacher.connect import started_models
from opd.teacher.model_info import read_layer_shape
from opd.tracking.console import SilentProgress
from opd.world import World
from tests.support.cuda import pretend_cards

COUNTS = (0, 1, 2, 4, 8)
VISIBLE = {0: "", 1: "3", 2: "4,6", 4: "GPU-a,GPU-b,GPU-c,GPU-d", 8: None}
"""CUDA_VISIBLE_DEVICES of a machine with so many GPUs."""
STORED = {
    "Qwen/Qwen2.5-7B-Instruct": (28, 4, 18944),
    "agentica-org/DeepScaleR-1.5B-Preview": (12, 2, 8960),
    "Qwen/Qwen3-4B": (32, 8, 9728),
    ".cache/smollm2-135m-instruct": (9, 3, 1536),
}
"""Attention heads, heads of keys and values, and width of the MLP in the config.json of recipes' teachers."""
RECIPES = {name: (name, ()) for name in sorted(bundled_recipes())} | {
    "quickstart rollout=server": ("quickstart", ("rollout=server",)),
    "qwen2.5_1.5b_gsm8k teacher apart": ("qwen2.5_1.5b_gsm8k", ("teacher.devices='6,7'",)),
}
LAUNCHERS = ("torchrun", "srun", "accelerate")
MAX_LENGTH = 1024
NOT_STARTED = (
    "only `opd train` without another launcher (RANK is set) starts teacher servers: start `opd teacher` and "
    "give {}, or use teacher=local"
)
NO_FIRST_RUN = (
    "this mask needs a training run before this one, which only `opd train` itself starts: make the "
    "mask with `opd mask discover` and use mask=file, or use launch.processes=N without a launcher"
)

compose_once = cache(lambda path, overrides: composed(path, list(overrides)))


def stored_config(heads: int, groups: int, width: int) -> LlamaConfig:
    return LlamaConfig(
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=width,
        hidden_size=64 * heads,
        dtype="bfloat16",
    )


class EngineStarted(Exception):
    """Raised in place of an engine, with the arguments that vLLM would get."""


def refuse_to_start(model: str, **arguments: Any) -> NoReturn:
    raise EngineStarted(arguments | {"model": model})


@pytest.fixture(autouse=True)
def _no_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """vLLM starts nothing, no process group is made, and the environment is left as it was."""
    before = dict(os.environ)
    vllm = pytest.importorskip("vllm")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vllm, "LLM", refuse_to_start)
    # on a CPU vLLM's own view of a model's config is asked for, and models of the hub have none here
    monkeypatch.setattr("opd.rollout.vllm._cpu_settings", lambda model, length, **_: {})
    monkeypatch.setattr("opd.rollout.vllm.join_alone", lambda device: None)
    monkeypatch.setattr(backend_vllm, "join_alone", lambda device: None)
    read = AutoConfig.from_pretrained
    stored = {model: stored_config(*shape) for model, shape in STORED.items()}
    monkeypatch.setattr(
        AutoConfig,
        "from_pretrained",
        lambda model, **options: stored[model] if model in stored else read(model, **options),
    )
    for module in (devices, train):
        monkeypatch.setattr(
            module, "composed", lambda path, overrides: compose_once(path, tuple(overrides))
        )
    yield
    os.environ.clear()
    os.environ.update(before)


@cache
def engine_arguments() -> frozenset[str]:
    """Every argument that the installed vLLM takes."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.llm import LLM

    own = set(inspect.signature(LLM.__init__).parameters) - {"self", "kwargs"}
    return frozenset(own | {f.name for f in fields(EngineArgs)})


@dataclass
class Machine:
    """The share of each GPU that is taken, by its name."""

    shares: dict[str, float] = field(default_factory=dict)

    def take(self, visible: Sequence[str], arguments: dict[str, Any]) -> None:
        assert set(arguments) <= engine_arguments()
        assert arguments.get("tensor_parallel_size", 1) == max(1, len(visible))
        for name in visible:
            taken = self.shares.get(name, 0.0) + arguments["gpu_memory_utilization"]
            assert taken <= 1 - MARGIN + 1e-6, f"GPU {name} is asked for {taken:g}"
            self.shares[name] = taken


def rank_arguments(config: Config, own: World) -> dict[str, Any] | None:
    """What vLLM gets inside a rank; None where it has no engine."""
    inputs = EngineInputs(
        config=config,
        model=config.student.model,
        tokenizer=cast(Any, None),
        max_length=MAX_LENGTH,
        world=own,
        progress=SilentProgress(),
    )
    if not isinstance(config.rollout, VllmRolloutConfig):
        return None
    with pytest.raises(EngineStarted) as started:
        build_engine(inputs)
    return started.value.args[0]


def visible_to(command: ChildCommand) -> list[str]:
    listed = command.environment.get("CUDA_VISIBLE_DEVICES")
    return [] if listed is None else listed.split(",")


def require_sound_ranks(
    commands: list[ChildCommand],
    placement: Placement,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """Each rank has a GPU of its own, and an engine that fits; the GPUs' names, in the order of the ranks."""
    count = placement.cards.count
    arguments = commands[0].arguments
    assert arguments[:2] == ("-m", "opd.run.worker")
    config = compose_once(find_recipe(arguments[2]), arguments[3:]).config
    assert config.launch.processes == len(commands)
    taken = []
    for rank, command in enumerate(commands):
        assert command.arguments == arguments
        environment, visible = command.environment, visible_to(command)
        assert (environment["RANK"], environment["WORLD_SIZE"]) == (str(rank), str(len(commands)))
        assert len(set(visible)) == len(visible) == len(placement.rank_cards)
        local = int(environment["LOCAL_RANK"])
        device = torch.device("cpu")
        if count:
            assert local < len(visible)
            device = torch.device("cuda", world._own_device(local, len(visible)))
            taken.append(visible[device.index])
        with monkeypatch.context() as inside:
            for name, value in environment.items():
                inside.setenv(name, value)
            own = World(rank=rank, size=len(commands), local_rank=local, device=device)
            engine = rank_arguments(config, own) if rank in (0, len(commands) - 1) else None
        if engine is not None:
            assert engine["distributed_executor_backend"] == (
                "external_launcher" if count else "uni"
            )
            machine.take([visible[device.index]] if count else [], engine)
    assert len(set(taken)) == len(taken), "one rank per GPU"
    return taken


def require_sound_teacher(command: ChildCommand, count: int, machine: Machine) -> list[str]:
    """The server's arguments are accepted by its parser, its model divides; the names of its GPUs."""
    visible = visible_to(command)
    assert command.arguments[:3] == ("-m", "opd.run.serve", "teacher")
    config = parse_arguments(TeacherServerConfig, command.arguments[3:])
    assert (len(visible) > 0) == (count > 0)
    assert config.tensor_parallel_size == max(1, len(visible))
    shape = read_layer_shape(config.model)
    assert shape is not None
    assert shape.divides(config.tensor_parallel_size)
    if config.backend == TeacherBackend.vllm:
        with pytest.raises(EngineStarted) as started:
            backend_vllm.VllmBackend(config.model, config)
        machine.take(visible, started.value.args[0])
    return visible


def require_sound_rollout_server(command: ChildCommand, count: int, machine: Machine) -> list[str]:
    visible = visible_to(command)
    assert len(visible) == min(1, count)
    assert command.arguments[:3] == ("-m", "opd.run.serve", "rollout")
    config = parse_arguments(RolloutServerConfig, command.arguments[3:])
    assert config.max_model_len == MAX_LENGTH
    with pytest.raises(EngineStarted) as started:
        build_engine_host(config)
    machine.take(visible, started.value.args[0])
    return visible


def start_here(recipe: Recipe, folder: Path) -> tuple[Placement, list[list[ChildCommand]]]:
    """What ``opd train`` would start: teacher servers, rollout servers, ranks."""
    cards = find_cards()
    recipe = resolved(recipe, cards)
    found = problems(recipe.config)
    if found:
        raise ValueError("\n".join(found))
    require_devices(recipe.config, cards)
    placement = place(recipe.config, cards)
    return placement, [
        teacher_commands(recipe.config, placement),
        rollout_commands(recipe.config, placement, max_length=MAX_LENGTH),
        rank_commands(recipe, placement, folder, port=29500),
    ]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", RECIPES)
def test_opd_train_starts_what_these_gpus_can_hold(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, count, visible=VISIBLE[count])
    bundled, overrides = RECIPES[name]
    recipe = compose_once(find_recipe(bundled), overrides)
    names = find_cards().ids or tuple(map(str, range(count)))
    if "teacher.devices='6,7'" in overrides and count < 8:
        if not count:
            overrides = ()
        else:
            there = ", ".join(names)
            with pytest.raises(ValueError) as error:
                start_here(recipe, tmp_path)
            missing = next(card for card in ("6", "7") if card not in names)
            assert str(error.value) == (
                f"teacher.devices=6,7 names {missing}, and the visible GPUs are {there}: name some of "
                "these, or make more visible (CUDA_VISIBLE_DEVICES)"
            )
            return
    placement, (teachers, rollouts, ranks) = start_here(recipe, tmp_path)
    torch_engine = recipe.config.launch.engine == LaunchEngine.torch
    expected = 1 if torch_engine else count or recipe.config.launch.cpu_processes
    expected -= 2 if count and "teacher.devices='6,7'" in overrides else 0
    assert len(ranks) == expected
    machine = Machine()
    on_ranks = require_sound_ranks(ranks, placement, machine, monkeypatch)
    on_teachers = [card for c in teachers for card in require_sound_teacher(c, count, machine)]
    on_rollouts = [
        card for c in rollouts for card in require_sound_rollout_server(c, count, machine)
    ]
    assert len(teachers) == len(started_models(recipe.config.teacher))
    assert {*on_ranks, *on_teachers, *on_rollouts} <= set(names)
    if expected < count:
        assert not set(on_ranks) & {*on_teachers, *on_rollouts}, "GPUs without ranks are there"
    assert set(machine.shares) <= set(names)


def ranks_of(launcher: str, rank: int, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables that a launcher gives to a rank of one machine."""
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    match launcher:
        case "srun":
            variables |= {
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NTASKS": str(ranks),
                "SLURM_STEP_NUM_TASKS": str(ranks),
                "SLURM_NNODES": "1",
            }
        case "torchrun" | "accelerate":
            variables |= {"LOCAL_WORLD_SIZE": str(ranks), "GROUP_RANK": "0"}
            variables |= {"TORCHELASTIC_RUN_ID": "none"}
    if launcher == "accelerate":
        variables |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def address_overrides(config: Config) -> tuple[str, ...]:
    """Overrides that give running servers in place of those that a run would start."""
    overrides: tuple[str, ...] = ()
    if isinstance(config.teacher, PoolTeacherConfig):
        overrides = tuple(f"teacher.members.{name}='http://h:1'" for name in config.teacher.members)
    elif started_models(config.teacher):
        overrides = ("teacher.url=http://h:1",)
    return overrides


def refusal(config: Config, ranks: int) -> str | None:
    """The sentence that another launcher's ranks must end with; None where they train."""
    if config.launch.engine == LaunchEngine.torch and ranks > 1:
        return (
            f"launch.engine=torch runs one process, found launch.processes={ranks}: "
            "use launch.engine=deepspeed"
        )
    if started_models(config.teacher):
        pool = isinstance(config.teacher, PoolTeacherConfig)
        return NOT_STARTED.format(
            "their addresses in teacher.members" if pool else "teacher.url=http://HOST:PORT"
        )
    if isinstance(active_mask(config), DiscoverMaskConfig):
        return NO_FIRST_RUN
    return None


def cells() -> list[Any]:
    """Recipes as they are, and with the addresses of running servers where they name a server's model."""
    return [
        pytest.param(
            launcher,
            name,
            count,
            served,
            id=f"{launcher}-{name}-{count}-{'served' if served else 'as it is'}",
        )
        for launcher in LAUNCHERS
        for name in sorted(bundled_recipes())
        for served in (False, True)
        for count in (
            COUNTS if served else (0, 8)
        )  # that servers are missing does not depend on it
    ]


@pytest.mark.parametrize(("launcher", "name", "count", "served"), cells())
def test_another_launcher_s_rank_finds_its_gpu_or_one_sentence(
    launcher: str,
    name: str,
    count: int,
    served: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = compose_once(find_recipe(name), ())
    if served:
        recipe = compose_once(recipe.path, address_overrides(recipe.config))
    ranks = count or 2
    visible = min(1, count) if launcher == "srun" else count
    machine, devices_seen = Machine(), set()
    for rank in sorted({0, ranks - 1}):
        pretend_cards(monkeypatch, visible)
        ranks_of(launcher, rank, ranks, monkeypatch)
        expected = refusal(recipe.config, ranks)
        if expected is not None:
            with pytest.raises(ValueError) as error:
                prepare_mask(train.joined_recipe(recipe), tmp_path, train._cannot_run_first)
            assert str(error.value) == expected
            continue
        joined = train.joined_recipe(recipe).config
        assert joined.launch.processes == ranks
        local, device = rank, torch.device("cpu")
        if count:
            device = torch.device("cuda", world._own_device(local, torch.cuda.device_count()))
            assert int(os.environ["LOCAL_RANK"]) == device.index < torch.cuda.device_count()
            devices_seen.add(rank if launcher == "srun" else device.index)
        own = World(rank=rank, size=ranks, local_rank=local, device=device)
        engine = rank_arguments(joined, own)
        if engine is not None:
            machine.take([f"card of rank {rank}"] if count else [], engine)
    if count and refusal(recipe.config, ranks) is None:
        assert len(devices_seen) == min(2, ranks)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["quickstart", "qwen3_1.7b_dapo_math", "paper_opd_k1"])
def test_more_processes_than_gpus_are_refused_by_name(
    name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, count)
    recipe = compose_once(find_recipe(name), ("launch.processes=8",))
    with pytest.raises(ValueError) as error:
        start_here(recipe, tmp_path)
    assert str(error.value) == (
        f"launch.processes=8 needs as many GPUs and {count} can be seen: set launch.processes={count}, or "
        "make more visible (CUDA_VISIBLE_DEVICES)"
    )


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_launcher_with_more_ranks_than_gpus_is_refused(
    launcher: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch/accelerate/one_node.yaml starts 8."""
    pretend_cards(monkeypatch, count)
    ranks_of(launcher, 0, 8, monkeypatch)
    with pytest.raises(ValueError) as error:
        train.joined_recipe(
            compose_once(find_recipe("contrast_quickstart"), ("launch.engine=deepspeed",))
        )
    assert str(error.value) == (
        f"the launcher started 8 ranks on this machine and {count} GPU(s) can be seen: start {count} "
        "(--nproc-per-node, num_processes), or make more visible (CUDA_VISIBLE_DEVICES)"
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_number_that_is_not_the_launcher_s_is_refused(
    launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_cards(monkeypatch, 1 if launcher == "srun" else 4)
    ranks_of(launcher, 0, 4, monkeypatch)
    with pytest.raises(ValueError) as error:
        train.joined_recipe(compose_once(find_recipe("quickstart"), ("launch.processes=2",)))
    assert str(error.value) == (
        "launch.processes=2, and the launcher started WORLD_SIZE=4 ranks: start 2, or leave "
        "launch.processes=auto"
    )
