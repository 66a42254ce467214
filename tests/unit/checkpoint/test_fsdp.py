"""Shards that two ranks wrote as DTensors are the model that was cut."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd.checkpoint.fsdp import shard_files
from opd.checkpoint.tensors import open_checkpoint

WRITE = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, folder = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
full = torch.load(f"{folder}/full.pt")
line, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
cuts = {"replicated": [Replicate()], "columns": [Shard(1)]}
state = {n: distribute_tensor(t, line, cuts.get(n, [Shard(0)])) for n, t in full.items()}
state["plain"] = torch.full((2, 2), 3.0)
torch.save(state, f"{folder}/model_world_size_2_rank_{rank}.pt")
os.makedirs(f"{folder}/twice", exist_ok=True)
torch.save({"w": distribute_tensor(full["even"], square, [Replicate(), Shard(0)])},
           f"{folder}/twice/model_world_size_2_rank_{rank}.pt")
dist.barrier()
os._exit(0)  # at once: after gloo an interpreter may abort at its exit
"""
READ = """
import sys, torch
from opd.checkpoint.tensors import open_checkpoint
tensors = {n: s.read() for n, s in open_checkpoint(sys.argv[1]).items()}
torch.save(tensors, sys.argv[2])
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    torch.manual_seed(0)
    full = {
        "even": torch.randn(6, 4).bfloat16(),
        "uneven": torch.randn(7, 3),
        "too_few": torch.randn(1, 5),
        "vector": torch.randn(5).half(),
        "columns": torch.randn(3, 5),
        "replicated": torch.randn(2, 2),
    }
    torch.save(full, folder / "full.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, str(folder)],
            env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=(folder / f"stderr_{rank}").open("w"),
        )
        for rank in range(2)
    ]
    statuses = [rank.wait() for rank in ranks]
    assert statuses == [0, 0], [(folder / f"stderr_{rank}").read_text() for rank in range(2)]
    return folder


@pytest.mark.parametrize("first", ["", "import torch.distributed.tensor\n"])
def test_every_tensor_is_whole_again(written: Path, tmp_path: Path, first: str) -> None:
    """Whether or not torch has made its own classes known."""
    out = str(tmp_path / "read.pt")
    subprocess.run([sys.executable, "-c", first + READ, str(written), out], check=True)
    found, full = torch.load(out), torch.load(written / "full.pt")
    assert set(found) == {*full, "plain"}
    for name, tensor in full.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert torch.equal(found["plain"], torch.full((2, 2), 3.0))


def test_an_analysis_of_shards_is_that_of_the_model(written: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from opd.analysis.walk import AnalysisInputs, measure_checkpoints

    full = torch.load(written / "full.pt") | {"plain": torch.full((2, 2), 3.0)}
    for folder, tensors in (("whole", full), ("base", {n: 0.99 * t for n, t in full.items()})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    rows = [
        measure_checkpoints(
            AnalysisInputs(base=str(tmp_path / "base"), trained=str(trained)), tmp_path / f"out{i}"
        )
        for i, trained in enumerate((written, tmp_path / "whole"))
    ]
    assert len(rows[0]) == 7
    assert rows[0] == rows[1]


def test_a_missing_rank_is_named(written: Path, tmp_path: Path) -> None:
    name = "model_world_size_2_rank_0.pt"
    (tmp_path / name).write_bytes((written / name).read_bytes())
    with pytest.raises(ValueError, match=r"lacks the shard model_world_size_2_rank_1\.pt"):
        open_checkpoint(str(tmp_path))


def test_shards_of_two_runs_are_refused(tmp_path: Path) -> None:
    for name in ("model_world_size_1_rank_0.pt", "model_world_size_2_rank_0.pt"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="1 and 2 ranks"):
        shard_files(tmp_path)


def test_a_cut_along_two_meshes_is_refused(written: Path) -> None:
    with pytest.raises(ValueError, match="w is sharded as Replicate x Shard"):
        open_checkpoint(str(written / "twice"))


def test_a_file_that_would_run_code_does_not(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"w": Evil()}, tmp_path / "model_world_size_1_rank_0.pt", pickle_module=pickle)
    with pytest.raises(ValueError, match="cannot be read"):
        open_checkpoint(str(tmp_path))
    assert not (tmp_path / "ran").exists()
