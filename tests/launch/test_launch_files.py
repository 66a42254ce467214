"""Every file in launch/ starts what its recipe needs: scripts run fake commands, and these are read."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser
from transformers import Qwen2Config, Qwen3Config

from opd.config.arguments import parse_arguments
from opd.config.launch import merged_deepspeed
from opd.config.schema import problems
from opd.config.teacher import ServerTeacherConfig, TeacherServerConfig
from opd.config.train import Precision
from opd.run.recipe import Recipe, load_recipe
from opd.teacher.model_info import require_divisible_heads

LAUNCH = Path(__file__).parent.parent.parent / "launch"
FAKES = ("srun", "scontrol", "curl", "sleep", "torchrun", "opd", "python")
SCRIPTS = sorted(
    path.relative_to(LAUNCH).as_posix()
    for path in LAUNCH.rglob("*")
    if path.suffix in (".sh", ".sbatch")
)
HEADS = {
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944
    ),
    "Qwen/Qwen3-4B": Qwen3Config(
        num_attention_heads=32, num_key_value_heads=8, intermediate_size=9728
    ),
    "agentica-org/DeepScaleR-1.5B-Preview": Qwen2Config(
        num_attention_heads=12, num_key_value_heads=2, intermediate_size=8960
    ),
}
"""Attention heads and MLP of the recipes' teachers, as in their configs."""
GPU_RECIPES = {"qwen2.5_1.5b_gsm8k", "qwen3_1.7b_dapo_math", "paper_opd_k1"}


@dataclass(frozen=True, slots=True)
class Call:
    """A command line that a script ran, and a part of its environment."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    pid: int


@dataclass(frozen=True, slots=True)
class Done:
    """How a script ended, what it printed, and what it ran."""

    status: int
    output: str
    calls: list[Call]

    def named(self, name: str) -> list[Call]:
        return [call for call in self.calls if call.name == name]


class Machines:
    """A folder of fake commands, on PATH before the real ones."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "calls.jsonl"
        self._log.touch()
        commands = folder / "bin"
        commands.mkdir()
        source = Path(__file__).with_name("fake_commands.py").read_text()
        for name in FAKES:
            (commands / name).write_text(f"#!{sys.executable} -IS\n{source}")
            (commands / name).chmod(0o755)
        self._environment = {
            "PATH": f"{commands}:/usr/bin:/bin",
            "FAKE_LOG": str(self._log),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "n[1-9]",
            "SLURM_CPUS_ON_NODE": "64",
        }

    def start(self, script: str, *words: str, **environment: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *words],
            env=self._environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: "subprocess.Popen[str]") -> Done:
        output, _ = process.communicate(timeout=120)
        return Done(process.returncode, output, self.calls())

    def run(self, script: str, *words: str, **environment: str) -> Done:
        return self.finish(self.start(script, *words, **environment))

    def calls(self) -> list[Call]:
        return [Call(**json.loads(line)) for line in self._log.read_text().splitlines()]


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


def trained(call: Call) -> tuple[Recipe, Any]:
    """The recipe that a torchrun command line composes to, and torchrun's own arguments."""
    arguments = get_args_parser().parse_args(call.arguments)
    assert arguments.module
    assert arguments.training_script == "opd.cli.main"
    command, name, *overrides = arguments.training_script_args
    assert command == "train"
    recipe = load_recipe(name, *overrides)
    assert problems(recipe.config) == []
    return recipe, arguments


def require_world(recipe: Recipe, arguments: Any) -> None:
    """As many ranks as torchrun starts: RANK, WORLD_SIZE and the recipe agree."""
    world = int(arguments.nnodes) * int(arguments.nproc_per_node)
    assert recipe.config.launch.processes == world


def require_heads(folder: Path, model: str, tensor_parallel_size: int) -> None:
    saved = folder / "heads"
    HEADS[model].save_pretrained(saved)
    require_divisible_heads(str(saved), tensor_parallel_size)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_is_bash_that_stops_at_the_first_error(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = (LAUNCH / script).read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert "TOKEN" not in "".join(line for line in lines if "OPD_TEACHER_TOKEN" not in line)


@pytest.mark.parametrize(
    ("recipe", "nodes", "gpus", "teacher_nodes", "tp"),
    [
        ("qwen2.5_1.5b_gsm8k", 2, 8, 1, 4),
        ("qwen2.5_1.5b_gsm8k", 2, 2, 1, 1),
        ("qwen3_1.7b_dapo_math", 3, 8, 1, 8),
        ("qwen3_1.7b_dapo_math", 6, 4, 2, 2),
        ("paper_opd_k1", 3, 8, 1, 2),
        ("paper_opd_k1", 5, 4, 2, 4),
    ],
)
def test_slurm_starts_teachers_and_ranks_on_nodes_of_their_own(
    machines: Machines,
    tmp_path: Path,
    recipe: str,
    nodes: int,
    gpus: int,
    teacher_nodes: int,
    tp: int,
) -> None:
    names = [f"n{i}" for i in range(1, nodes + 1)]
    model = load_recipe(recipe).config.teacher.model
    assert model is not None
    done = machines.run(
        "slurm/train.sbatch", recipe, "run.dir=runs/a", "train.steps=3",
        FAKE_NODES=",".join(names), SLURM_GPUS_ON_NODE=str(gpus), TEACHER=model,
        TEACHER_NODES=str(teacher_nodes), TEACHER_TP=str(tp), FAKE_TEACHER_S="60", FAKE_TRAIN_S="0.3",
    )  # fmt: skip
    assert done.status == 0, done.output

    ranks = done.named("torchrun")
    assert {call.environment["FAKE_NODE"] for call in ranks} == set(names[:-teacher_nodes])
    assert len(ranks) == nodes - teacher_nodes
    for call in ranks:
        composed, arguments = trained(call)
        require_world(composed, arguments)
        assert int(arguments.nnodes) == nodes - teacher_nodes
        assert int(arguments.nproc_per_node) == gpus
        assert arguments.rdzv_endpoint == "n1:29400"
        assert composed.config.run.dir == "runs/a"

    require_servers(done, tmp_path, model, names[-teacher_nodes:], gpus, tp)
    assert all(gone(call.pid) for call in done.calls)


def require_servers(
    done: Done, folder: Path, model: str, nodes: Sequence[str], gpus: int, tp: int
) -> None:
    """Every GPU of the teacher's nodes is in one server, and the ranks know all addresses and the token."""
    servers = done.named("opd")
    addresses, cards = [], []
    for call in servers:
        assert call.arguments[0] == "teacher"
        config = parse_arguments(TeacherServerConfig, call.arguments[1:])
        assert config.model == model
        assert config.host == "0.0.0.0"
        assert config.tensor_parallel_size == tp
        own = call.environment["CUDA_VISIBLE_DEVICES"].split(",")
        assert len(own) == tp
        cards += [(call.environment["FAKE_NODE"], int(card)) for card in own]
        addresses.append(f"http://{call.environment['FAKE_NODE']}:{config.port}")
    require_heads(folder, model, tp)
    assert sorted(cards) == [(node, card) for node in nodes for card in range(gpus)]
    composed, _ = trained(done.named("torchrun")[0])
    assert isinstance(composed.config.teacher, ServerTeacherConfig)
    assert composed.config.teacher.url is not None
    assert sorted(composed.config.teacher.url.split(",")) == sorted(addresses)

    tokens = {call.environment["OPD_TEACHER_TOKEN"] for call in [*servers, *done.named("torchrun")]}
    [token] = tokens
    assert len(token) >= 32
    shown = [argument for call in done.calls for argument in call.arguments]
    assert not [argument for argument in shown if token in argument], "the token is visible in ps"
    assert token not in done.output


def test_slurm_takes_the_gpus_that_it_was_given(machines: Machines) -> None:
    done = machines.run(
        "slurm/train.sbatch", "paper_opd_k1", FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="2",
        CUDA_VISIBLE_DEVICES="5,7", TEACHER="T", FAKE_TEACHER_S="60",
    )  # fmt: skip
    assert done.status == 0, done.output
    assert sorted(c.environment["CUDA_VISIBLE_DEVICES"] for c in done.named("opd")) == ["5", "7"]


def test_slurm_without_a_teacher_trains_on_every_node(machines: Machines) -> None:
    done = machines.run(
        "slurm/train.sbatch", "qwen2.5_1.5b_gsm8k", "method=self_distill",
        FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="4",
    )  # fmt: skip
    assert done.status == 0, done.output
    assert done.named("opd") == []
    assert len(done.named("torchrun")) == 2
    recipe, arguments = trained(done.named("torchrun")[0])
    require_world(recipe, arguments)
    assert recipe.choices["teacher"] == "self"


def test_slurm_ends_at_once_when_a_teacher_cannot_start(machines: Machines) -> None:
    started = time.monotonic()
    done = machines.run(
        "slurm/train.sbatch", "paper_opd_k1", FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="2",
        TEACHER="T", FAKE_TEACHER_STATUS="2",
    )  # fmt: skip
    assert done.status == 1
    assert "a teacher server ended while it started" in done.output
    assert done.named("torchrun") == []
    assert time.monotonic() - started < 30


def test_slurm_gives_up_a_teacher_that_is_never_ready(machines: Machines) -> None:
    done = machines.run(
        "slurm/train.sbatch", "paper_opd_k1", FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="1",
        TEACHER="T", TEACHER_WAIT_S="1", TEACHER_PORT="8377", FAKE_TEACHER_S="60",
        FAKE_UNREACHABLE="1",
    )  # fmt: skip
    assert done.status == 1
    assert "http://n2:8377 is not ready after 1 s" in done.output
    assert all(gone(call.pid) for call in done.calls)


def test_slurm_ends_the_run_when_a_teacher_ends(machines: Machines) -> None:
    done = machines.run(
        "slurm/train.sbatch", "paper_opd_k1", FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="2",
        TEACHER="T", FAKE_TEACHER_S="1.5", FAKE_TEACHER_STATUS="9", FAKE_TRAIN_S="60",
    )  # fmt: skip
    assert done.status == 1
    assert "a teacher server ended (status 9) while the run needed it" in done.output
    assert len(done.named("torchrun")) == 1
    assert all(gone(call.pid) for call in done.calls)


def test_slurm_passes_on_the_status_of_the_run_and_ends_the_teachers(machines: Machines) -> None:
    done = machines.run(
        "slurm/train.sbatch", "paper_opd_k1", FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="2",
        TEACHER="T", FAKE_TEACHER_S="60", FAKE_TRAIN_STATUS="2",
    )  # fmt: skip
    assert done.status == 2, done.output
    assert all(gone(call.pid) for call in done.calls)


def test_slurm_leaves_nothing_behind_when_it_is_cancelled(machines: Machines) -> None:
    process = machines.start(
        "slurm/train.sbatch", "paper_opd_k1", FAKE_NODES="n1,n2", SLURM_GPUS_ON_NODE="2",
        TEACHER="T", FAKE_TEACHER_S="60", FAKE_TRAIN_S="60",
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not [c for c in machines.calls() if c.name == "torchrun"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    done = machines.finish(process)
    assert done.status == 143
    assert all(gone(call.pid) for call in done.calls)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"FAKE_NODES": "n1", "SLURM_GPUS_ON_NODE": "8", "TEACHER": "T"},
            "1 nodes, of which 1 serve",
        ),
        ({"FAKE_NODES": "n1,n2"}, "no GPUs on this node"),
        (
            {"FAKE_NODES": "n1,n2", "SLURM_GPUS_ON_NODE": "8", "TEACHER": "T", "TEACHER_TP": "3"},
            "TEACHER_TP=3 does not divide the 8 GPUs",
        ),
    ],
)
def test_slurm_refuses_nodes_and_gpus_that_cannot_work(
    machines: Machines, environment: dict[str, str], reason: str
) -> None:
    done = machines.run("slurm/train.sbatch", "paper_opd_k1", **environment)
    assert done.status == 2
    assert reason in done.output
    assert {call.name for call in done.calls} <= {"scontrol"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_without_a_recipe_says_what_to_give(machines: Machines, script: str) -> None:
    done = machines.run(script, FAKE_GPUS="8", SLURM_GPUS_ON_NODE="8", FAKE_NODES="n1")
    assert done.status == 2
    assert "give a recipe" in done.output


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 8), (4, 4)])
@pytest.mark.parametrize("recipe", sorted(GPU_RECIPES))
def test_torchrun_starts_a_rank_for_every_gpu(
    machines: Machines, recipe: str, nodes: int, gpus: int
) -> None:
    for rank in range(nodes):
        machines.run(
            "torchrun/train.sh", recipe, "teacher.url=http://t:1", NODES=str(nodes),
            NODE_RANK=str(rank), MASTER_ADDR="head", FAKE_GPUS=str(gpus),
        )  # fmt: skip
    calls = [call for call in machines.calls() if call.name == "torchrun"]
    assert len(calls) == nodes
    for rank, call in enumerate(calls):
        composed, arguments = trained(call)
        require_world(composed, arguments)
        assert int(arguments.nnodes) == nodes
        if nodes > 1:
            assert (int(arguments.node_rank), arguments.master_addr) == (rank, "head")
        else:
            assert arguments.standalone


def test_torchrun_refuses_a_node_without_a_number_or_a_gpu(machines: Machines) -> None:
    unnumbered = machines.run("torchrun/train.sh", "paper_opd_k1", NODES="2", FAKE_GPUS="8")
    assert unnumbered.status != 0
    assert "the number of this node" in unnumbered.output
    without = machines.run("torchrun/train.sh", "paper_opd_k1", FAKE_GPUS="0")
    assert without.status == 2
    assert "torch sees no GPU" in without.output


@pytest.mark.parametrize(
    ("recipe", "gpus", "teacher", "tp"),
    [("qwen2.5_1.5b_gsm8k", 4, 2, 2), ("qwen3_1.7b_dapo_math", 8, 4, 4), ("paper_opd_k1", 2, 1, 1)],
)
def test_the_teacher_has_cards_of_its_own_on_one_machine(
    machines: Machines, tmp_path: Path, recipe: str, gpus: int, teacher: int, tp: int
) -> None:
    done = machines.run(
        "local/teacher_apart.sh", recipe, FAKE_GPUS=str(gpus), TEACHER_GPUS=str(teacher),
        TEACHER_TP=str(tp),
    )  # fmt: skip
    [call] = done.named("opd")
    command, name, *overrides = call.arguments
    composed = load_recipe(name, *overrides)
    assert (command, problems(composed.config)) == ("train", [])
    config = composed.config.teacher
    assert isinstance(config, ServerTeacherConfig)
    assert config.devices is not None
    ranks = range(composed.config.launch.processes)
    assert [*map(str, ranks), *config.devices.split(",")] == [str(card) for card in range(gpus)]
    assert config.tensor_parallel_size == tp
    assert config.model is not None
    require_heads(tmp_path, config.model, tp)


def test_several_servers_on_one_machine_share_the_cards(machines: Machines) -> None:
    done = machines.run(
        "local/teacher_apart.sh", "paper_opd_k1", GPUS="8", TEACHER_GPUS="4", TEACHER_TP="2"
    )
    [call] = done.named("opd")
    assert {"teacher.devices='4,5,6,7'", "teacher.replicas=2"} <= set(call.arguments)
    refused = machines.run("local/teacher_apart.sh", "paper_opd_k1", GPUS="4", TEACHER_GPUS="4")
    assert (refused.status, "none is left to train" in refused.output) == (2, True)


@pytest.mark.parametrize("name", ["one_node", "several_nodes"])
def test_accelerate_reads_its_files(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    path = LAUNCH / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == "MULTI_GPU"
    assert config.num_processes == 8 * config.num_machines
    assert config.deepspeed_config == {}, "numerics belong to the recipe"
    usage = path.read_text().split("compute_environment")[0]
    assert f"launch.processes={config.num_processes} " in usage


@pytest.mark.parametrize(
    "path", sorted((LAUNCH / "deepspeed").glob("*.json")), ids=lambda p: p.stem
)
@pytest.mark.parametrize("zero", [2, 3])
def test_a_deepspeed_file_sets_nothing_that_the_recipe_owns(path: Path, zero: int) -> None:
    merged = merged_deepspeed(str(path), zero=zero, precision=Precision.bf16, max_grad_norm=1.0)
    assert merged["zero_optimization"]["stage"] == zero


def kubernetes(name: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((LAUNCH / "kubernetes" / name).read_text())
    return {document["kind"]: document for document in documents}


def test_the_kubernetes_job_starts_the_ranks_of_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = kubernetes("train.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]
    replicas = sum(spec["replicas"] for spec in specs.values())
    for rank, spec in enumerate(specs.values()):
        [container] = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        given = {"RANK": str(rank), "MASTER_ADDR": "opd-train-master-0", "MASTER_PORT": "23456"}
        arguments = [_expanded(argument, given) for argument in container["args"]]
        call = Call(container["command"][0], arguments, {}, 0)
        assert call.name == "torchrun"
        recipe, parsed = trained(call)
        require_world(recipe, parsed)
        assert (int(parsed.nnodes), int(parsed.node_rank)) == (replicas, rank)
        assert int(parsed.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert "token" not in " ".join(arguments).lower()
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["memory"] == "/dev/shm"
        assert str(recipe.config.run.dir).startswith(mounts["runs"])


def _expanded(argument: str, variables: dict[str, str]) -> str:
    for name, value in variables.items():
        argument = argument.replace(f"$({name})", value)
    assert "$(" not in argument
    return argument


def test_the_kubernetes_teacher_is_what_the_job_asks_for(tmp_path: Path) -> None:
    documents = kubernetes("teacher.yaml")
    pod = documents["Deployment"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    assert container["command"] == ["opd", "teacher"]
    config = parse_arguments(TeacherServerConfig, container["args"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.tensor_parallel_size
    require_heads(tmp_path, config.model, config.tensor_parallel_size)
    assert container["readinessProbe"]["httpGet"] == {"path": "/health", "port": config.port}

    service = documents["Service"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == config.port
    job = kubernetes("train.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Master"]
    [ranks] = job["template"]["spec"]["containers"]
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert f"teacher.url={address}" in ranks["args"]
    recipe = ranks["args"][ranks["args"].index("train") + 1]
    assert load_recipe(recipe).config.teacher.model == config.model
    secrets = [c["env"][0]["valueFrom"]["secretKeyRef"] for c in (container, ranks)]
    assert secrets[0] == secrets[1]


def test_the_readme_names_every_file() -> None:
    text = (LAUNCH / "README.md").read_text()
    files = [p.relative_to(LAUNCH).as_posix() for p in LAUNCH.rglob("*") if p.is_file()]
    assert [f for f in files if f != "README.md" and Path(f).name not in text] == []
    assert os.access(LAUNCH / "torchrun" / "train.sh", os.X_OK)


@pytest.mark.parametrize("model", HEADS)
def test_the_readme_lists_the_sizes_that_divide_the_heads(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="allowed are") as refused:
        require_heads(tmp_path, model, 5)
    sizes = str(refused.value).rpartition("allowed are ")[2]
    text = " ".join((LAUNCH / "README.md").read_text().split())
    assert f"allow {sizes}" in text
