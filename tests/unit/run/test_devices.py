"""GPUs are counted before anything starts, and vLLM's workers are spawned."""

import os
from pathlib import Path

import pytest
import torch

from opd import world
from opd.run import devices
from opd.run.devices import find_cards, require_devices, require_running_servers, resolved
from opd.run.environment import child_environment
from opd.run.place import place
from opd.run.recipe import Recipe, composed, load_recipe
from opd.vllm_start import CHILDREN, set_start_method
from tests.support.cuda import GIB, pretend_cards

SRUN = {"WORLD_SIZE": "16", "SLURM_NNODES": "2", "SLURM_LOCALID": "3", "LOCAL_RANK": "3"}


def started(*overrides: str) -> Recipe:
    """The quickstart as `opd train` starts it here: with a number of processes, and placed."""
    cards = find_cards()
    recipe = resolved(load_recipe("quickstart", *overrides), cards)
    require_devices(recipe.config, cards)
    place(recipe.config, cards)
    return recipe


@pytest.mark.parametrize(
    ("cards", "processes", "fits"),
    [(0, 1, True), (0, 8, True), (1, 1, True), (1, 2, False), (2, 2, True), (2, 8, False)],
)
def test_no_more_processes_than_gpus_start(
    monkeypatch: pytest.MonkeyPatch, cards: int, processes: int, fits: bool
) -> None:
    pretend_cards(monkeypatch, cards)
    if fits:
        assert started(f"launch.processes={processes}").config.launch.processes == processes
    else:
        sentence = rf"set launch.processes={cards}, or make more visible"
        with pytest.raises(ValueError, match=sentence):
            started(f"launch.processes={processes}")


def test_a_gpu_that_torch_cannot_use_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_cards(monkeypatch, 0)
    driver = tmp_path / "version"
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.1\nGCC version: 9\n")
    monkeypatch.setattr(devices, "DRIVER", driver)
    with pytest.raises(ValueError, match=r"Kernel Module 470.1.*the driver is too old") as error:
        started()
    assert "\n" not in str(error.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert started().config.launch.processes == 2


def test_a_vllm_for_the_cpu_on_a_machine_with_gpus_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cards(monkeypatch, 1)
    monkeypatch.setattr(devices, "CPU_VLLM", "pytest")  # a distribution that is installed
    with pytest.raises(ValueError, match=r"1 GPU\(s\) and the installed vLLM is pytest") as error:
        started()
    assert "\n" not in str(error.value)
    started("rollout=transformers", "teacher=local")
    started("rollout=transformers", "teacher.backend=torch")
    with pytest.raises(ValueError, match="the installed vLLM is pytest"):
        started("teacher=local")
    pretend_cards(monkeypatch, 0)
    monkeypatch.setattr(devices, "CPU_VLLM", "pytest")
    started()


@pytest.mark.parametrize(
    ("count", "overrides", "processes"),
    [
        (0, [], 2),  # launch.cpu_processes of the quickstart
        (0, ["launch.cpu_processes=3"], 3),
        (1, [], 1),
        (2, [], 2),
        (8, [], 8),
        (8, ["train.prompts_per_step=5"], 5),
        (0, ["train.prompts_per_step=1"], 1),
        (8, ["launch.engine=torch"], 1),
        (0, ["launch.engine=torch"], 1),
        (8, ["teacher.devices='6,7'"], 6),
        (8, ["teacher.devices='6,7'", "rollout=server", "rollout.devices='5'"], 5),
        (2, ["teacher.devices='0,1'"], 2),
        (2, ["teacher.devices='0'", "teacher.url=http://127.0.0.1:1"], 2),
        (8, ["launch.processes=3"], 3),
    ],
)
def test_auto_is_a_process_for_every_gpu_that_is_left(
    monkeypatch: pytest.MonkeyPatch, count: int, overrides: list[str], processes: int
) -> None:
    pretend_cards(monkeypatch, count)
    recipe = resolved(load_recipe("quickstart", *overrides), find_cards())
    assert recipe.config.launch.processes == processes
    assert recipe.plain["launch"]["processes"] == processes
    again = composed(recipe.path, recipe.overrides)
    assert again.config.launch.processes == processes, "a worker sees the same number"


def test_under_another_launcher_auto_is_the_number_of_its_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_cards(monkeypatch, 8)
    for name, value in {"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    cards = find_cards()
    assert (cards.count, cards.nodes) == (8, 2)
    recipe = resolved(load_recipe("quickstart"), cards)
    assert recipe.config.launch.processes == 16
    with pytest.raises(
        ValueError, match=r"launch\.processes=8, and the launcher started WORLD_SIZE=16"
    ):
        resolved(load_recipe("quickstart", "launch.processes=8"), cards)
    assert place(
        resolved(load_recipe("quickstart", "teacher=local"), cards).config, cards
    ).ranks == tuple(range(8)), "the placement is that of one machine"


@pytest.mark.parametrize(
    ("variables", "visible", "count", "nodes"),
    [
        ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}, 4, 4, 1),  # torchrun, accelerate
        ({"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}, 8, 8, 2),
        (SRUN, 1, 8, 2),  # one GPU a task
        (SRUN, 8, 8, 2),
        (
            SRUN | {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "8"},
            1,
            1,
            2,
        ),  # torchrun in a task
        ({"WORLD_SIZE": "4"}, 0, 0, 1),
    ],
)
def test_the_nodes_and_gpus_of_another_launcher_are_counted(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    visible: int,
    count: int,
    nodes: int,
) -> None:
    pretend_cards(monkeypatch, visible)
    for name, value in {"RANK": "0", **variables}.items():
        monkeypatch.setenv(name, value)
    cards = find_cards()
    assert (cards.count, cards.nodes) == (count, nodes)


def test_a_variable_that_changed_after_torch_counted_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_cards(monkeypatch, 4, visible="0,2,3")
    assert (find_cards().count, find_cards().ids) == (3, ("0", "2", "3"))


def test_ranks_without_a_gpu_are_refused_by_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cards(monkeypatch, 2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"started 8 ranks on this machine and 2 GPU\(s\)"):
        require_devices(load_recipe("quickstart").config, find_cards())


def test_tasks_of_srun_that_know_no_rank_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_cards(monkeypatch, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ValueError, match=r"srun started 8 tasks .* RANK is not set"):
        require_devices(load_recipe("quickstart").config, find_cards())
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    require_devices(load_recipe("quickstart").config, find_cards())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "starts teacher servers: start `opd teacher` and give teacher.url"),
        (["teacher=local", "rollout=server"], "starts rollout servers.*give rollout.urls"),
        (["teacher=pool", "+teacher.members.a=m"], "their addresses in teacher.members"),
        (["teacher=local"], None),
        (["teacher.url=http://127.0.0.1:1"], None),
    ],
)
def test_another_launcher_starts_no_servers(overrides: list[str], words: str | None) -> None:
    config = load_recipe("quickstart", *overrides).config
    if words is None:
        require_running_servers(config, {})
    else:
        with pytest.raises(ValueError, match=words):
            require_running_servers(config, {})
        addresses = {"OPD_TEACHER_URLS": '{"m": ["http://h:1"]}', "OPD_ROLLOUT_URLS": "http://h:2"}
        require_running_servers(config, addresses)


@pytest.mark.parametrize(
    ("visible", "count", "ids"),
    [
        (None, 2, ()),
        ("4,6", 2, ("4", "6")),
        ("GPU-8932f937,GPU-1a2b", 2, ("GPU-8932f937", "GPU-1a2b")),
        ("MIG-aa,MIG-bb", 1, ("MIG-aa",)),  # CUDA shows one MIG instance to a process
        ("", 0, ()),
    ],
)
def test_the_names_of_visible_gpus_are_those_of_the_variable(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, count: int, ids: tuple[str, ...]
) -> None:
    pretend_cards(monkeypatch, count, visible=visible)
    cards = find_cards()
    assert (cards.count, cards.ids) == (count, ids)
    assert cards.memory_bytes == (80 * GIB if count else 0)


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


def test_ranks_of_torchrun_in_one_task_of_srun_do_not_share_its_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="has no GPU of its own"):
        world._own_device(1, 1)


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
